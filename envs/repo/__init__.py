"""Bugs in real Python packages, to be found and repaired with a shell and an editor."""

from envs.repo.environment import RepoEnvironment

__all__ = ["RepoEnvironment"]
