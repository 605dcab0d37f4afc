"""Where untrusted tools run: no network, no host files, bounded resources, gone without a trace when closed."""

from envs.interface import SandboxError
from envs.sandbox.limits import ExecResult, Limits
from envs.sandbox.pool import SandboxPool
from envs.sandbox.session import Sandbox

__all__ = ["ExecResult", "Limits", "Sandbox", "SandboxError", "SandboxPool"]
