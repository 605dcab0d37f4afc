"""Stateless pods that draw tickets, run episodes with an engine and environments, and adopt new weights."""
