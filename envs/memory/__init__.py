"""Memory: facts told over several sessions, the context cleared in between, a question in the last one."""

from envs.memory.environment import MemoryEnvironment

__all__ = ["MemoryEnvironment"]
