"""The trainer: owns progress, turns trajectories into weights, publishes them."""
