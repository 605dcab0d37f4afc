"""The gateway: an OpenAI-compatible endpoint per episode, so that any agent program can be trained as it is."""
