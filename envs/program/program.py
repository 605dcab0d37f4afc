"""What a program is, what it may use, and what it came to. Plain facts; starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, get_args

from envs.sandbox import Limits

TextBy = Literal["stdin", "argument", "file", "nothing"]
TEXT_FILE = "task.txt"
MAX_FILES = 256

# A program is more than a tool: interpreters reserve address space by the gigabyte, agents have threads and libraries.
LIMITS = Limits(
    processes=128,
    memory_bytes=32 << 30,
    file_bytes=64 << 20,
    work_bytes=64 << 20,
    tmp_bytes=64 << 20,
    open_files=512,
    cpu_s=600,
)


@dataclass(frozen=True, slots=True)
class Program:
    """One run of an agent program.

    command: argument vector; the first is looked up on PATH, on which `python` is Ergon's own where the program is
    trusted. text: the task, given on standard input, as the last argument, in the file `task.txt`, or not at all.
    files: what else is in its working directory, by relative path. variables: of its environment, beside those of the
    endpoint. artifacts: files that are read back after its end. Raises ValueError.
    """

    command: tuple[str, ...]
    text: str = ""
    text_by: TextBy = "stdin"
    files: Mapping[str, bytes] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    artifacts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("a program needs a command")
        if self.text_by not in (ways := get_args(TextBy)):
            raise ValueError(f"text_by is {self.text_by!r}; choose {', '.join(ways)}")
        if len(self.files) > MAX_FILES:
            raise ValueError(f"a program with {len(self.files)} files: at most {MAX_FILES}; mount a directory instead")
        for path in (*self.files, *self.artifacts):
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
                raise ValueError(f"{path!r} must be a path inside the program's working directory, without `..`")

    @property
    def arguments(self) -> list[str]:
        """The whole argument vector."""
        return [*self.command, *([self.text] if self.text_by == "argument" else [])]

    @property
    def contents(self) -> dict[str, bytes]:
        """All files of the working directory."""
        return {**self.files, **({TEXT_FILE: self.text.encode()} if self.text_by in ("stdin", "file") else {})}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What programs of an environment may do.

    trusted: it runs as a process of this user, with network and files, instead of in a sandbox. timeout_s: wall-clock
    seconds; the ticket's deadline counts as well. output_bytes: of stdout, of stderr and of each artifact that are
    kept. limits: of the sandbox. mounts: directories of this machine that the sandbox shows, read-only, by where it
    shows them.
    """

    trusted: bool = False
    timeout_s: float = 600.0
    output_bytes: int = 64 << 10
    limits: Limits = LIMITS
    mounts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("timeout_s", "output_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        for path in self.mounts:
            if not PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"mounts has {path!r}; a mount is shown at an absolute path of the sandbox")


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """What a program came to. exit_code: None where it was killed for its time or for flooding its output.

    truncated: stdout or stderr was longer than what was kept. artifacts: content by path, of those that there are.
    """

    exit_code: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool
    timed_out: bool
    duration_s: float
    artifacts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What it printed, as text without the white space around it."""
        return self.stdout.decode(errors="replace").strip()
