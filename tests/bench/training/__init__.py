"""The parts of `make bench-learner`: one batch of episodes, four trainers that take steps on it, and what is told."""
