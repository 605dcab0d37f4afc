"""Tools: typed functions that the policy may call, and the episode that runs its calls."""

from envs.tools.episode import ToolEpisode
from envs.tools.typed import ToolError, ToolOutput, ToolSet

__all__ = ["ToolEpisode", "ToolError", "ToolOutput", "ToolSet"]
