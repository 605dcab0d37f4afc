"""What a command printed, as text that a policy may see. Runs nothing."""

from __future__ import annotations

from envs.sandbox import ShellResult


def readable(output: bytes) -> str:
    """Output as text without control characters: nothing that it holds can steer a terminal that shows it."""
    text = output.decode(errors="replace").replace("\r\n", "\n")
    return "".join(each if each.isprintable() or each in "\n\t" else f"\\x{ord(each):02x}" for each in text)


def shown(result: ShellResult, timeout_s: float) -> str:
    """The observation of a shell command: its output, and what else the policy must know of it, in brackets."""
    parts = [readable(result.output).rstrip("\n")]
    if result.truncated:
        parts.append("[output was cut]")
    if result.timed_out:
        parts.append(f"[interrupted: it ran past {timeout_s:g} s or wrote too much]")
    if result.restarted:
        parts.append("[the shell ended and was started again: variables and background jobs are gone]")
    elif result.exit_code:
        parts.append(f"[exit status {result.exit_code}]")
    return "\n".join(part for part in parts if part)
