"""The bubblewrap command line: what a sandbox sees, and the sentences for a machine that cannot make one.

Owns namespaces, mounts, environment and resource limits. Never runs a command of the policy, never falls back to
anything weaker: without bubblewrap 0.8 and unprivileged user namespaces there is no sandbox.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from envs.interface import SandboxError
from envs.sandbox.limits import Limits

WORK_DIR = "/workspace"
SESSION = "/session"
SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
OLDEST_BUBBLEWRAP = (0, 8)  # the first with --disable-userns

# Root skips RLIMIT_NPROC and owns the host's files, so as root the sandbox runs under this id, which systemd's
# allocation leaves unused and nothing else has.
SANDBOX_ID = 60700
INNER_ID = 1000

# Read-only, where they exist. Not all of /usr: /usr/src and /usr/local/src are where people keep their own code.
SYSTEM_PATHS = (
    "/usr/bin",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/share",
    "/usr/local/bin",
    "/usr/local/lib",
    "/etc/alternatives",
    "/etc/ld.so.cache",
)
FAMILIAR_LINKS = {"/app": WORK_DIR, "/logs": "/tmp/logs"}  # where tasks written for containers look
TOP_LEVEL_LINKS = ("/bin", "/lib", "/lib32", "/lib64")
# An installed Ergon or third-party environment would show the policy how its tasks and graders work.
HIDDEN_PATTERNS = (
    "/usr/lib/python3*/*-packages",
    "/usr/lib64/python3*/*-packages",
    "/usr/local/lib/python3*/*-packages",
)

PASSWD = f"agent:x:{INNER_ID}:{INNER_ID}::{WORK_DIR}:/bin/sh\n".encode()
GROUP = f"agent:x:{INNER_ID}:\n".encode()

# PID 1 of the sandbox. Its stdin is a socket: commands come in, and each one's nonce and exit status go out on it.
# Commands have neither that socket nor a way to it: PID 1 runs from a file without read permission, so the kernel makes
# it undumpable, and its /proc entries and memory are closed to its children; nor can they signal it. A command may use
# two processes fewer than PID 1 may, so that a command's fork bomb cannot stop PID 1 from starting the next.
# `shell` instead of a number of lines starts the persistent shell (shell.py), whose own socket and output pipe are
# descriptors 3 and 4; commands do not have them. `env` undoes what `&` does to SIGINT.
# dash calls the limit of processes -p; bash calls it -u.
SESSION_LOOP = r"""
unset SHLVL
if (ulimit -p "$1") 2>/dev/null; then flag=-p; else flag=-u; fi
printf 'ready\n' >&0
while IFS= read -r nonce && IFS= read -r lines; do
  if [ "$lines" = shell ]; then
    (ulimit $flag "$1"; exec setsid env --default-signal=INT,QUIT bash --noprofile --norc -i) <&3 >/dev/null 2>&1 3>&- &
    printf '%s %s\n' "$nonce" "$!" >&0
    continue
  fi
  script=
  while [ "$lines" -gt 0 ]; do
    IFS= read -r line
    script="$script$line
"
    lines=$((lines - 1))
  done
  (ulimit $flag "$1"; exec /bin/sh -c "$script") </dev/null 3>&- 4>&-
  printf '%s %s\n' "$nonce" "$?" >&0
done
"""


@functools.cache
def _checked(path: str) -> str:
    """The path of a bubblewrap that is new enough."""
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    match = re.search(r"(\d+)\.(\d+)", text)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_BUBBLEWRAP:
        raise SandboxError(
            f"sandboxes need bubblewrap 0.8 or newer, but {path} says {text.strip()!r}: "
            "install a newer one (Debian 12 and later: `apt-get install bubblewrap`)"
        )
    return path


def find_bubblewrap() -> str:
    """The path of a usable `bwrap`. Raises SandboxError with the command to type."""
    path = shutil.which("bwrap")
    if path is None:
        raise SandboxError("sandboxes need bubblewrap, which is not installed: type `apt-get install bubblewrap`")
    return _checked(path)


def find_program(name: str) -> str:
    """The path of a program of the host's search path that starts or runs in sandboxes. Raises SandboxError."""
    path = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
    if path is None:
        raise SandboxError(f"sandboxes need the program `{name}`, which is not in /usr/bin, /bin or /usr/local/bin")
    return path


def failure(stderr: str) -> SandboxError:
    """The one sentence for a bubblewrap that ended before the sandbox was ready."""
    detail = " ".join(stderr.split()) or "it ended without a word"
    if detail.startswith("setpriv:"):
        return SandboxError(
            f"sandboxes may not drop root's identity here ({detail}): run as an ordinary user, "
            "or give the container the capabilities SETUID and SETGID"
        )
    if "source path" in detail:
        return SandboxError(
            f"a mount cannot be shown in the sandbox ({detail}): it must exist, and others must be able to read it "
            "and to enter the directories above it"
        )
    if re.search(r"unshare:|namespace|uid map|Operation not permitted|Permission denied|clone", detail):
        return SandboxError(
            f"this user may not make the namespaces of a sandbox here ({detail}): allow them with "
            "`sysctl -w kernel.unprivileged_userns_clone=1` (Debian), "
            "`sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu), or a container security profile "
            "that permits unprivileged user namespaces"
        )
    return SandboxError(f"bubblewrap could not make a sandbox ({detail})")


@functools.cache
def system_mounts() -> tuple[str, ...]:
    """The arguments that show the host's programs and libraries, read-only, and nothing else of it."""
    args: list[str] = []
    for name in SYSTEM_PATHS:
        if Path(name).exists():
            args += ["--ro-bind", name, name]
    for name in TOP_LEVEL_LINKS:
        if Path(name).is_symlink():
            args += ["--symlink", str(Path(name).readlink()), name]
        elif Path(name).exists():
            args += ["--ro-bind", name, name]
    for pattern in HIDDEN_PATTERNS:
        for found in sorted(Path("/").glob(pattern.lstrip("/"))):
            args += ["--size", "4096", "--perms", "0555", "--tmpfs", str(found)]
    return tuple(args)


def _entry(limits: Limits, shell_fds: tuple[int, int]) -> str:
    """What bash does before it becomes the session loop: limits, hard and soft alike, and the shell's descriptors."""
    control, output = shell_fds
    ulimits = {
        "u": limits.processes + 3,  # PID 1, and two it may start when a command has used up its own
        "v": max(1, limits.memory_bytes >> 10),
        "f": max(1, limits.file_bytes >> 10),
        "n": limits.open_files,
        "t": limits.cpu_s,
        "c": 0,
    }
    bounds = " ".join(f"-{flag} {value}" for flag, value in ulimits.items())
    return f'ulimit {bounds} && exec "$@" 3<&{control} 4>&{output} {control}<&- {output}>&-'


def check_path(path: str) -> str:
    """The absolute path of a file of the sandbox; relative ones are under /workspace. Raises ValueError."""
    pure = PurePosixPath(WORK_DIR, path)
    if "\0" in path or ".." in pure.parts or pure == PurePosixPath(WORK_DIR):
        raise ValueError(f"{path!r} is no file path of a sandbox: it must name a file, without `..`")
    return str(pure)


def outer_command() -> list[str]:
    """What starts bubblewrap: without root's identity, in a PID namespace around the sandbox's own.

    Two PID namespaces: bubblewrap alone, killed while it starts, leaves a child that waits for it forever. So it starts
    as the first process of an outer namespace, and with that one the kernel kills whatever there is. `--pdeathsig` and
    `--kill-child` see to it that the outer one ends when its owner does.
    """
    args = [find_program("setpriv"), "--pdeathsig=KILL"]
    if os.geteuid() == 0:
        args += [f"--reuid={SANDBOX_ID}", f"--regid={SANDBOX_ID}", "--clear-groups"]
    args += ["--", find_program("unshare"), "--user", "--map-current-user", "--pid"]
    return [*args, "--fork", "--kill-child=KILL", "--"]


def command_line(
    limits: Limits,
    file_fds: Mapping[str, int],
    seccomp_fd: int,
    shell_fds: tuple[int, int],
    mounts: Mapping[str, str] | None = None,
    hidden: Sequence[str] = (),
) -> Sequence[str]:
    """The whole argument vector of a sandbox whose PID 1 is the session loop.

    file_fds: absolute path in the sandbox -> descriptor with its content; must hold SESSION (the shell that runs the
    loop). Files outside /workspace and /tmp are immutable in the sandbox. seccomp_fd: the filter of system calls.
    shell_fds: the persistent shell's socket and output pipe; bash moves them to 3 and 4, which dash cannot. mounts:
    path in the sandbox -> path of the host, shown read-only. hidden: files and directories of the system, absolute and
    without links, that are empty in the sandbox.
    """
    args = [*outer_command(), find_bubblewrap()]
    args += ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    args += ["--new-session", "--as-pid-1", "--cap-drop", "ALL", "--hostname", "sandbox"]
    args += ["--seccomp", str(seccomp_fd)]
    args += ["--uid", str(INNER_ID), "--gid", str(INNER_ID), "--clearenv"]
    for key, value in {"PATH": SEARCH_PATH, "HOME": WORK_DIR, "LANG": "C.UTF-8"}.items():
        args += ["--setenv", key, value]
    args += system_mounts()
    for name in hidden:
        empty = ["--size", "4096", "--perms", "0555", "--tmpfs"] if Path(name).is_dir() else ["--ro-bind", "/dev/null"]
        args += [*empty, name]
    args += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    args += ["--size", str(limits.tmp_bytes), "--tmpfs", "/tmp"]
    args += ["--size", str(limits.work_bytes), "--tmpfs", WORK_DIR]
    for path, source in (mounts or {}).items():
        args += ["--ro-bind", source, path]
    for path, fd in file_fds.items():
        args += ["--perms", "0111" if path == SESSION else "0644", "--file", str(fd), path]
    for name, target in FAMILIAR_LINKS.items():
        args += ["--symlink", target, name]
    args += ["--remount-ro", "/", "--chdir", WORK_DIR, "--"]
    args += [find_program("bash"), "--noprofile", "--norc", "-c", _entry(limits, shell_fds), SESSION]
    args += [SESSION, "-c", SESSION_LOOP, SESSION, str(limits.processes + 1)]
    return args
