"""The parts of `make bench-async`: the main job with slow tools, admission closed and open, and what is told of it."""
