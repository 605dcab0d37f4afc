"""What survives a crash: tickets, trajectories, learner sessions."""
