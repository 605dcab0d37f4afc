"""MiniWoB++'s pages with the tools of `browser`; the package that ships them is the optional extra `miniwob`."""

from envs.browser.miniwob.environment import MiniwobEnvironment

__all__ = ["MiniwobEnvironment"]
