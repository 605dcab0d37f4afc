"""Logging of every process: one line per event, on stderr, as text or (ERGON_LOG_FORMAT=json) as JSON lines."""

from __future__ import annotations

import json
import logging
import os
import sys
import time


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (ISO, UTC), level, process, logger, message, and the traceback if there is one."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class Throttle:
    """The level of a message that a peer can cause at any rate: its own once per `every_s`, DEBUG in between."""

    def __init__(self, every_s: float = 1.0) -> None:
        self._every_s, self._logged_at = every_s, float("-inf")

    def level(self, level: int) -> int:
        """The level to log at now."""
        now = time.monotonic()
        if now - self._logged_at < self._every_s:
            return logging.DEBUG
        self._logged_at = now
        return level


def configure_logging(process: str) -> None:
    """Send this process's log to stderr. Level by ERGON_LOG_LEVEL (default INFO)."""
    handler = logging.StreamHandler(sys.stderr)
    if os.environ.get("ERGON_LOG_FORMAT", "text") == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        formatter = logging.Formatter(
            f"%(asctime)s.%(msecs)03d %(levelname)-7s {process} %(name)s: %(message)s", "%H:%M:%S"
        )
        handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(os.environ.get("ERGON_LOG_LEVEL", "INFO").upper())
