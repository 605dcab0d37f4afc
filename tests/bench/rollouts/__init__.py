"""What the rollout benchmark is made of: the environment with slow tools, the actor's and the synchronous side."""
