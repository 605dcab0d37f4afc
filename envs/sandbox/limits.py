"""What a sandbox may use, and what a command in it came to. Plain facts; starts nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one sandbox. The kernel enforces all but `output_bytes`, `timeout_s` and `start_timeout_s`.

    Memory is bounded per process, so a sandbox can hold at most `processes * memory_bytes + work_bytes + tmp_bytes`.
    """

    processes: int = 16
    """Processes and threads at once."""
    memory_bytes: int = 256 << 20
    """Address space of one process."""
    file_bytes: int = 8 << 20
    """Largest file a process may write."""
    work_bytes: int = 16 << 20
    """Size of /workspace, which lives in memory."""
    tmp_bytes: int = 8 << 20
    """Size of /tmp, which lives in memory."""
    open_files: int = 64
    """File descriptors of one process."""
    cpu_s: int = 20
    """CPU seconds of one process."""
    output_bytes: int = 64 << 10
    """Bytes of stdout, and of stderr, that are kept of one command; the rest is dropped."""
    timeout_s: float = 10.0
    """Wall-clock seconds of one command, unless the call says otherwise."""
    start_timeout_s: float = 30.0
    """Wall-clock seconds until a new sandbox must be ready."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) <= 0:
                raise ValueError(f"sandbox limit {each.name} is {getattr(self, each.name)}; it must be greater than 0")


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What one command came to. `exit_code` is None where it was killed for its time or for flooding its output.

    `truncated`: stdout or stderr was longer than what was kept. A timed-out or flooding command takes its sandbox with
    it: the whole PID namespace is dead when this result is returned, and further calls raise SandboxError.
    """

    exit_code: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    timed_out: bool
    duration_s: float

    @property
    def ok(self) -> bool:
        """The command ran to its end and exited with 0."""
        return self.exit_code == 0
