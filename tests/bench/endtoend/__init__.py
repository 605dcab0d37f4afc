"""The parts of `make bench-end-to-end`: the main job trained by Ergon and by TRL, and what is told of it."""
