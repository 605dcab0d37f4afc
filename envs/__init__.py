"""Environments, their tools, sandboxes and graders. Knows nothing of actors, learners or brokers."""
