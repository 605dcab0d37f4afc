"""The run's line files: what a line is, and those of trained.jsonl (which trajectory was consumed when).

trained.jsonl is the surviving history: on resume it is cut back to the length that the checkpoint names, so a
trajectory stands in it once however often the learner was killed. metrics.jsonl only grows; its lines carry the
lineage.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.batching import Consumed


class LineFile:
    """An append-only file of JSON lines."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    @property
    def num_bytes(self) -> int:
        """Its length."""
        return self._file.tell()

    def append(self, lines: Iterable[Any], *, durable: bool) -> None:
        """Add lines; on disk when this returns, where `durable`."""
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    def cut(self, num_bytes: int) -> None:
        """Forget what lies beyond `num_bytes`. Raises ValueError where the file is shorter than that."""
        length = self._file.seek(0, os.SEEK_END)
        if length < num_bytes:
            raise ValueError(f"{self._file.name} has {length} bytes, the checkpoint expects at least {num_bytes}")
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def audit_lines(consumed: Iterable[Consumed], step: int) -> Iterable[dict[str, Any]]:
    """The lines of trained.jsonl for one batch."""
    for item in consumed:
        head = item.trajectory.head
        yield {
            "ticket_id": head.ticket.ticket_id,
            "step": step,
            "fate": "trained" if item.trained else "masked",
            "reason": item.reason.value,
            "kind": head.kind or head.ticket.task.env,
            "reward": head.reward,
        }


@dataclass(frozen=True, slots=True)
class AuditCounts:
    """What trained.jsonl says. `num_duplicated`: ids that stand in it more than once, counted per extra line."""

    num_trained: int
    num_masked: int
    num_ids: int
    num_duplicated: int


def read_audit(path: Path) -> AuditCounts:
    """Count the lines of trained.jsonl."""
    ids: Counter[str] = Counter()
    fates: Counter[str] = Counter()
    with path.open() as file:
        for text in file:
            line = json.loads(text)
            ids[line["ticket_id"]] += 1
            fates[line["fate"]] += 1
    return AuditCounts(fates["trained"], fates["masked"], len(ids), ids.total() - len(ids))
