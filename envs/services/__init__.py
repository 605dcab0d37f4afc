"""Services: a shop, a calendar, tickets and files behind one HTTP-like API; graded on what the database holds."""

from envs.services.environment import ServicesEnvironment

__all__ = ["ServicesEnvironment"]
