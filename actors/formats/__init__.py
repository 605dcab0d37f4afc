"""Chat formats: how messages, tools and turns are written, and how a sampled turn is read. One module for each."""
