"""A run for people to look at: `ergon report` writes one HTML page, `ergon view` browses its trajectories. Reads."""
