"""Reasoning: questions without tools, answered in one turn and checked by static verifiers."""

from envs.reason.environment import ReasonEnvironment

__all__ = ["ReasonEnvironment"]
