"""Chromium's command line and the box it runs in: without network, without files of the host, without privileges.

Chromium runs as an unprivileged user in namespaces of its own (bubblewrap), where there is no network interface but an
empty loopback, nothing of the host but programs, libraries and fonts, and nothing to write but memory. Inside of that
it keeps its own sandbox around every page. Owns the process; knows nothing of pages.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from typing import BinaryIO

from envs.browser.cdp import Connection
from envs.interface import SandboxError
from envs.sandbox import bubblewrap

START_LIMIT_S = 120.0
MEMORY_BYTES = 2 << 30  # of a process's own data
PROFILE_BYTES = 256 << 20
SHARED_BYTES = 512 << 20
HEAP_MB = 128  # of a page's scripts
WINDOW = "1024,768"

# Debian's headless shell has no user interface, and so fewer libraries and a quicker start.
PROGRAMS = ("/usr/lib/chromium/chromium-headless-shell", "chromium-headless-shell", "chromium")
FEATURES_OFF = (
    "AcceptCHFrame",
    "BackForwardCache",
    "DialMediaRouteProvider",
    "MediaRouter",
    "OptimizationHints",
    "PaintHolding",
    "Translate",
)
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--user-data-dir=/tmp/profile",
    f"--disable-features={','.join(FEATURES_OFF)}",
    f"--js-flags=--max-old-space-size={HEAP_MB}",
    f"--window-size={WINDOW}",
    "--block-new-web-contents",
    "--deny-permission-prompts",
    "--disable-background-networking",
    "--disable-background-timer-throttling",
    "--disable-backgrounding-occluded-windows",
    "--disable-breakpad",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-hang-monitor",
    "--disable-prompt-on-repost",
    "--disable-quic",
    "--disable-renderer-backgrounding",
    "--disable-setuid-sandbox",
    "--disable-smooth-scrolling",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--lang=en-US",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--password-store=basic",
    "about:blank",
)


@functools.cache
def find_chromium() -> str:
    """The path of Debian's Chromium. Raises SandboxError with the command to type."""
    for name in PROGRAMS:
        path = shutil.which(name, path=bubblewrap.SEARCH_PATH)
        if path is not None:
            return path
    raise SandboxError(
        "the environment needs Chromium, which is not installed: type `apt-get install chromium-headless-shell`"
    )


def command_line(fd: int) -> list[str]:
    """The whole argument vector. fd: the end of a socket pair that becomes Chromium's descriptors 3 and 4."""
    args = [*bubblewrap.outer_command(), bubblewrap.find_bubblewrap()]
    args += ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1"]
    args += ["--cap-drop", "ALL", "--hostname", "browser", "--clearenv"]
    args += ["--uid", str(bubblewrap.INNER_ID), "--gid", str(bubblewrap.INNER_ID)]
    for key, value in {"PATH": bubblewrap.SEARCH_PATH, "HOME": "/tmp", "LANG": "C.UTF-8", "TZ": "UTC"}.items():
        args += ["--setenv", key, value]
    args += bubblewrap.system_mounts()
    args += ["--ro-bind-try", "/etc/fonts", "/etc/fonts", "--ro-bind-try", "/etc/chromium.d", "/etc/chromium.d"]
    args += ["--proc", "/proc", "--dev", "/dev"]
    args += ["--size", str(SHARED_BYTES), "--perms", "1777", "--tmpfs", "/dev/shm"]
    args += ["--size", str(PROFILE_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]
    args += ["--remount-ro", "/", "--chdir", "/tmp", "--"]
    limits = f"ulimit -c 0 && ulimit -d {MEMORY_BYTES >> 10}"
    args += [bubblewrap.find_program("bash"), "--noprofile", "--norc", "-c"]
    args += [f'{limits} && exec "$@" 3<&{fd} 4>&{fd} {fd}>&-', "chromium", find_chromium(), *FLAGS]
    return args


class Chromium:
    """One Chromium with all its processes. Close it always; it dies with the thread that started it."""

    def __init__(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.connection = connection
        self._process = process

    @classmethod
    async def start(cls) -> Chromium:
        """Start one and wait until it answers. Raises SandboxError."""
        with os.fdopen(os.memfd_create("ergon-chromium-log"), "rb") as said:
            process, ours = _spawned(said)
            chromium = cls(process, await Connection.over(ours))
            try:
                await chromium.connection.send("Browser.getVersion", limit_s=START_LIMIT_S)
            except (SandboxError, TimeoutError) as error:
                await chromium.close()
                raise _failure(said) from error
            except BaseException:
                await chromium.close()
                raise
        return chromium

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self.connection.closed.is_set()

    @property
    def pid(self) -> int:
        """The process id of its outermost process, with which all others end."""
        return self._process.pid

    async def close(self) -> None:
        """Kill it with everything in it, and wait until it is gone; idempotent."""
        self.connection.close()
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
            await asyncio.to_thread(self._process.wait)
        await self.connection.closed.wait()


def _spawned(said: BinaryIO) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A started Chromium, which writes its log to `said`, and our end of its pipe. Blocks for about 2 ms."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                command_line(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=said.fileno(),
                stderr=said.fileno(),
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env={},
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    ours.setblocking(False)
    return process, ours


def _failure(said: BinaryIO) -> SandboxError:
    """The one sentence for a Chromium that ended before it answered."""
    said.seek(0)
    text = said.read().decode(errors="replace")
    first = text.strip().splitlines()[:1]
    if first and first[0].startswith(("bwrap:", "setpriv:", "unshare:")):
        return bubblewrap.failure(first[0])
    return SandboxError(f"Chromium could not be started ({' '.join(text.split())[-400:] or 'it said nothing'})")
