"""Starts, watches and stops the processes of a run: the `ergon` command, local supervisor, chart."""
