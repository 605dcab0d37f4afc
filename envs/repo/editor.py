"""The editor: looks at files of the working copy and changes them, through the episode's shell. Grades nothing.

It goes through the policy's own shell, so whatever the policy does to files, links or that shell happens to the policy
alone: a command that hangs is interrupted like any other, and the sandbox lives on.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Protocol

from envs.interface import EnvironmentFailureError
from envs.sandbox import AnySandbox, ShellResult
from envs.tools import ToolError
from envs.tools.output import readable

MAX_FILE_BYTES = 512 << 10
PIECE = 12 << 10  # characters of one command, within its bounds however they are quoted and encoded
LINES_SHOWN = 200


class Editing(Protocol):
    """An episode that the editor works for."""

    sandbox: AnySandbox | None
    tool_timeout_s: float


async def view(
    episode: Editing,
    path: Annotated[str, "a file; relative paths are in /workspace"],
    first: Annotated[int, "the first line to show"] = 1,
    last: Annotated[int | None, "the last line to show; by default 200 lines are shown"] = None,
) -> str:
    """Show a file's lines with their numbers."""
    lines = (await _read(episode, path)).splitlines()
    end = min(len(lines), first + LINES_SHOWN - 1 if last is None else last)
    if first < 1 or first > max(1, len(lines)) or end < first - 1:
        raise ToolError(f"{path} has {len(lines)} lines; first and last must be among them")
    shown = [f"{number:6}  {lines[number - 1]}" for number in range(first, end + 1)]
    rest = [f"[{len(lines) - end} more lines]"] if end < len(lines) else []
    return "\n".join([*shown, *rest]) or "[an empty file]"


async def create(
    episode: Editing, path: Annotated[str, "where; a file there is overwritten"], text: Annotated[str, "all of it"]
) -> str:
    """Write a file."""
    await _write(episode, path, text)
    return f"wrote {path}, {len(text.splitlines())} lines"


async def str_replace(
    episode: Editing,
    path: Annotated[str, "a file; relative paths are in /workspace"],
    old: Annotated[str, "text that stands in the file exactly once, white space included"],
    new: Annotated[str, "what stands there afterwards"],
) -> str:
    """Replace a piece of a file's text."""
    text = await _read(episode, path)
    count = text.count(old) if old else 0
    if count != 1:
        raise ToolError(f"old stands {count} times in {path}; it must stand there once")
    await _write(episode, path, text.replace(old, new))
    return f"replaced at line {text[: text.index(old)].count(chr(10)) + 1} of {path}"


async def insert(
    episode: Editing,
    path: Annotated[str, "a file; relative paths are in /workspace"],
    line: Annotated[int, "the line after which it goes; 0 for the top"],
    text: Annotated[str, "the lines to insert"],
) -> str:
    """Insert lines into a file."""
    lines = (await _read(episode, path)).splitlines(keepends=True)
    if not 0 <= line <= len(lines):
        raise ToolError(f"{path} has {len(lines)} lines; line must be from 0 to {len(lines)}")
    if line and not lines[line - 1].endswith("\n"):
        lines[line - 1] += "\n"
    lines.insert(line, text if text.endswith("\n") else text + "\n")
    await _write(episode, path, "".join(lines))
    return f"inserted {len(text.splitlines())} lines after line {line} of {path}"


def _quoted(path: str) -> str:
    if not path or "\0" in path:
        raise ToolError("path must name a file")
    return shlex.quote(path if path.startswith("/") else f"/workspace/{path}")


async def _run(episode: Editing, command: str, output_bytes: int) -> ShellResult:
    if episode.sandbox is None:
        raise EnvironmentFailureError("the episode has not started, or is closed")
    result = await episode.sandbox.shell(command, timeout_s=episode.tool_timeout_s, output_bytes=output_bytes)
    if result.exit_code != 0:
        reason = "it took too long" if result.timed_out else readable(result.output[:200]).strip() or "it was refused"
        raise ToolError(reason)
    return result


async def _read(episode: Editing, path: str) -> str:
    """A file's text. Raises ToolError for what is no text, or too long."""
    target = _quoted(path)
    found = await _run(episode, f"command head -c {MAX_FILE_BYTES + 1} -- {target}", MAX_FILE_BYTES + 1)
    if len(found.output) > MAX_FILE_BYTES:
        raise ToolError(f"{path} has more than {MAX_FILE_BYTES} bytes")
    try:
        return found.output.decode()
    except UnicodeDecodeError:
        raise ToolError(f"{path} is no text in UTF-8") from None


async def _write(episode: Editing, path: str, text: str) -> None:
    """Write a file, piece by piece where it is long. Raises ToolError."""
    target = _quoted(path)
    if "\0" in text or len(text) > MAX_FILE_BYTES:
        raise ToolError(f"the text must be at most {MAX_FILE_BYTES} characters, without NUL")
    pieces = [""] if not text else [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    for number, piece in enumerate(pieces):
        await _run(episode, f"printf %s {shlex.quote(piece)} {'>>' if number else '>'} {target}", 4096)
