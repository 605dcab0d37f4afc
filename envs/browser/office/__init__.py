"""A small office's web application, its tasks, and the verifier of what they leave: the site of `browser`."""
