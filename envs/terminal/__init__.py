"""The terminal: a persistent shell in a sandbox, tasks with files, and a grader that only reads what is left."""

from envs.terminal.environment import TerminalEnvironment
from envs.terminal.harbor import HarborEnvironment

__all__ = ["HarborEnvironment", "TerminalEnvironment"]
