"""Browser: a web application in a real Chromium, acted on by its accessibility tree; graded on the server's state."""

from envs.browser.environment import BrowserEnvironment

__all__ = ["BrowserEnvironment"]
