"""Where untrusted tools run: no network, no host files, bounded resources, gone without a trace when closed."""

from envs.interface import SandboxError
from envs.sandbox.backends import AnySandbox, create_sandbox
from envs.sandbox.limits import ExecResult, Limits
from envs.sandbox.pool import SandboxPool
from envs.sandbox.session import Sandbox
from envs.sandbox.shell import ShellResult
from envs.sandbox.trusted import TrustedSandbox

__all__ = [
    "AnySandbox",
    "ExecResult",
    "Limits",
    "Sandbox",
    "SandboxError",
    "SandboxPool",
    "ShellResult",
    "TrustedSandbox",
    "create_sandbox",
]
