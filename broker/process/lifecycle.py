"""Start and end of a long-running process: stop signals, exit codes, one-sentence errors. Owns no sockets.

Exit codes: 0 a clean end (also after SIGTERM), 2 an error the user can mend (one sentence, no traceback), 1 the rest.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from broker.process.logs import configure_logging

logger = logging.getLogger(__name__)

EXIT_USER_ERROR = 2
_PR_SET_PDEATHSIG = 1


class ErgonError(Exception):
    """Something the user can mend. The message is one sentence: what, the value, what is allowed, the remedy."""


def install_stop() -> threading.Event:
    """An event that SIGTERM and SIGINT set. Call it from the main thread."""
    stop = threading.Event()

    def handle(signum: int, _frame: object) -> None:
        logger.info("stopping signal=%s", signal.Signals(signum).name)
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent dies, so that a killed supervisor leaves no orphans (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def raise_file_limit() -> None:
    """As many open files as the system allows: a server needs one per peer, and the usual limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_main(process: str, main: Callable[[], None]) -> NoReturn:
    """Run a process's main function with logging configured, and exit with the code that fits how it ended."""
    configure_logging(process)
    dies = os.environ.get("ERGON_DIE_WITH_PARENT")
    if dies:
        die_with_parent(signal.SIGKILL if dies == "killed" else signal.SIGTERM)
    try:
        main()
    except ErgonError as error:
        print(f"ergon {process}: error: {error}", file=sys.stderr)  # noqa: T201  the user's terminal, not the log
        _exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _exit(0)
    except SystemExit as error:  # argparse has said why; a launcher passes on the code of what it launched
        _exit(error.code if isinstance(error.code, int) else EXIT_USER_ERROR)
    except BaseException:
        logger.exception("process died")
        _exit(1)
    _exit(0)


def _exit(code: int) -> NoReturn:
    """End at once: libraries' non-daemon threads (engines, exporters) must not keep a finished process alive."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
