"""The parts of `make bench-scale`: simulated actors in great number, a learner that only counts, and what is told."""
