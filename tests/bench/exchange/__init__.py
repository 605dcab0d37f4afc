"""The load of the broker's benchmark: the same actors and the same learner for every queue that is compared."""
