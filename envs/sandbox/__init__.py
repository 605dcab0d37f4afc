"""Where untrusted tools run: no network, no host files, bounded resources, gone without a trace when closed."""

from envs.interface import SandboxError
from envs.sandbox.backends import AnySandbox, check_walled, create_sandbox
from envs.sandbox.limits import ExecResult, Limits
from envs.sandbox.pods import PodSandbox, PodSettings, configure_pods
from envs.sandbox.pool import SandboxPool
from envs.sandbox.session import Sandbox
from envs.sandbox.shell import ShellResult
from envs.sandbox.trusted import TrustedSandbox

__all__ = [
    "AnySandbox",
    "ExecResult",
    "Limits",
    "PodSandbox",
    "PodSettings",
    "Sandbox",
    "SandboxError",
    "SandboxPool",
    "ShellResult",
    "TrustedSandbox",
    "check_walled",
    "configure_pods",
    "create_sandbox",
]
