"""Code: write a function; hidden tests run it in a fresh sandbox, and the parent compares what comes out."""

from envs.code.environment import CodeEnvironment

__all__ = ["CodeEnvironment"]
