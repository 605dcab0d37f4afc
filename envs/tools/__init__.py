"""Tools: typed functions that the policy may call, and the episode that runs its calls."""

from envs.tools.episode import ToolEpisode
from envs.tools.runner import ToolRunner
from envs.tools.typed import ToolError, ToolOutput, ToolSet, ToolTimeoutError, tool

__all__ = ["ToolEpisode", "ToolError", "ToolOutput", "ToolRunner", "ToolSet", "ToolTimeoutError", "tool"]
