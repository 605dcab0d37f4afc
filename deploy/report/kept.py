"""The trajectories that a run keeps: an index of them, what of it a filter lets through, and one of them read whole.

The files are the learner's, which may be writing them, and thins them (learner/kept.py); here they are only read, and
never all at once. The index is a table in a temporary database of this process. Where a ticket is there twice, because
a learner died and was sent it again, the later one counts. A record that is damaged is left out and counted.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from broker.protocol.errors import ProtocolError
from broker.protocol.kept import FOLDER, Kept, file_name, parse_file_name, read_records, unpack_kept

COLUMNS: Final = {
    "ticket_id": "TEXT PRIMARY KEY",
    "number": "INTEGER",
    "level": "INTEGER",
    "start": "INTEGER",
    "length": "INTEGER",
    "group_id": "TEXT",
    "env": "TEXT",
    "kind": "TEXT",
    "mode": "TEXT",
    "evaluation": "TEXT",
    "step": "INTEGER",
    "fate": "TEXT",
    "outcome": "TEXT",
    "reward": "REAL",
    "verdict": "TEXT",
    "turns": "INTEGER",
    "calls": "INTEGER",
    "tokens": "INTEGER",
    "sampled": "INTEGER",
    "budget": "INTEGER",
    "forced": "INTEGER",
    "seconds": "REAL",
    "versions": "INTEGER",
    "finished_at": "REAL",
}
SORTS: Final = ("finished_at", "reward", "step", "turns", "sampled", "seconds")
CHOICES: Final = ("env", "kind", "mode", "evaluation", "fate", "outcome")
_KEPT_BYTES: Final = 1 << 20  # of texts handed over at once

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Filter:
    """What a list is narrowed to. Empty strings and None let everything through. `text`: in what was said."""

    env: str = ""
    kind: str = ""
    mode: str = ""
    evaluation: str = ""
    fate: str = ""
    outcome: str = ""
    group: str = ""
    text: str = ""
    step_from: int | None = None
    step_to: int | None = None
    reward_from: float | None = None
    reward_to: float | None = None

    def clauses(self) -> Iterator[tuple[str, Any]]:
        """SQL conditions with their value."""
        for name in CHOICES:
            if value := getattr(self, name):
                yield f"{name} = ?", value
        if self.group:
            yield "group_id = ?", self.group
        for name in ("step", "reward"):
            for end, sign in (("from", ">="), ("to", "<=")):
                if (bound := getattr(self, f"{name}_{end}")) is not None:
                    yield f"{name} {sign} ?", bound
        if self.text:
            yield (
                "EXISTS (SELECT 1 FROM texts WHERE texts.ticket_id = kept.ticket_id AND said LIKE ? ESCAPE '!')",
                ("%" + "".join(f"!{each}" if each in "%_!" else each for each in self.text) + "%"),
            )


EVERYTHING: Final = Filter()


class Index:
    """Of one run's kept trajectories. Every method may be called from any thread.

    num_damaged: records that could not be read.
    """

    def __init__(self, run_dir: Path) -> None:
        self._directory = run_dir / FOLDER
        self._lock = threading.RLock()
        self._database = sqlite3.connect("", check_same_thread=False)
        self._database.row_factory = sqlite3.Row
        columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        self._database.execute(f"CREATE TABLE kept ({columns})")
        self._database.execute("CREATE TABLE texts (ticket_id TEXT PRIMARY KEY, said TEXT)")
        self._read: dict[int, tuple[int, int]] = {}  # file number -> its level, bytes read
        self.num_damaged = 0

    def refresh(self) -> int:
        """Take in what was written since; how many trajectories that were."""
        with self._lock:
            changed = 0
            there = self._files()
            for number in self._read.keys() - there.keys():
                self._forget(number)
            for number, level in sorted(there.items()):
                known_level, end = self._read.get(number, (level, 0))
                if known_level != level:
                    self._forget(number)
                    end = 0
                changed += self._take(number, level, end)
            self._database.commit()
            return changed

    def _files(self) -> dict[int, int]:
        """The newest level of each file."""
        names = [parse_file_name(path.name) for path in self._directory.iterdir()] if self._directory.is_dir() else []
        found: dict[int, int] = {}
        for number, level in filter(None, names):
            found[number] = max(level, found.get(number, 0))
        return found

    def _forget(self, number: int) -> None:
        self._database.execute("DELETE FROM kept WHERE number = ?", (number,))
        del self._read[number]

    def _take(self, number: int, level: int, end: int) -> int:
        path = self._directory / file_name(number, level)
        try:
            with path.open("rb") as file:
                file.seek(end)
                data = file.read()
        except FileNotFoundError:
            return 0  # thinned just now: it has another name when it is looked for next
        try:
            records, whole = read_records(data)
        except ProtocolError:
            self.num_damaged += 1
            self._read[number] = level, end + len(data)
            return 0
        rows = list(self._rows(records, number, level, end))
        places = ", ".join("?" * len(COLUMNS))
        # What a later file has of a ticket is newer, whichever of the two was read first.
        self._database.executemany(
            f"INSERT INTO kept VALUES ({places}) ON CONFLICT (ticket_id) DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in COLUMNS)
            + " WHERE excluded.number >= kept.number",
            rows,
        )
        self._read[number] = level, end + whole
        return len(rows)

    def _rows(
        self, records: Sequence[tuple[int, int, Any]], number: int, level: int, end: int
    ) -> Iterator[tuple[Any, ...]]:
        for start, length, record in records:
            try:
                kept = unpack_kept(record)
            except ProtocolError:
                self.num_damaged += 1
                continue
            yield (kept.trajectory.ticket.ticket_id, number, level, end + start, length, *_facts(kept))

    def count(self, chosen: Filter = EVERYTHING) -> int:
        """How many there are."""
        where, values = _where(chosen)
        return int(self._ask(f"SELECT count(*) AS number FROM kept{where}", values)[0]["number"])

    def page(self, chosen: Filter, sort: str, first: int, number: int, *, descending: bool = True) -> list[Row]:
        """Rows `first` to `first + number` of the list, sorted by one of SORTS."""
        if sort not in SORTS:
            raise ValueError(f"cannot sort by {sort!r}; by {', '.join(SORTS)}")
        where, values = _where(chosen)
        order = "DESC" if descending else "ASC"
        asked = f"SELECT * FROM kept{where} ORDER BY {sort} {order}, ticket_id {order} LIMIT ? OFFSET ?"
        return self._ask(asked, (*values, number, first))

    def examples(self, condition: Literal["versions > 1", "forced > 0"]) -> list[Row]:
        """The newest one of which this holds, of training or evaluation."""
        asked = f"SELECT * FROM kept WHERE {condition} AND mode != 'reference' ORDER BY finished_at DESC LIMIT 1"
        return self._ask(asked, ())

    def choices(self) -> dict[str, list[str]]:
        """What there is to choose from, by filter."""
        return {
            name: [
                row[name] for row in self._ask(f"SELECT DISTINCT {name} FROM kept WHERE {name} != '' ORDER BY 1", ())
            ]
            for name in CHOICES
        }

    def find(self, ticket_id: str) -> Row | None:
        """A ticket's row; None where it is not kept."""
        rows = self._ask("SELECT * FROM kept WHERE ticket_id = ?", (ticket_id,))
        return rows[0] if rows else None

    def load(self, ticket_id: str) -> Kept | None:
        """A trajectory; None where it is not kept, or not any more."""
        with self._lock:
            for _ in range(2):  # its file may be thinned between the look into the index and the one into the file
                row = self.find(ticket_id)
                if row is None:
                    return None
                if (kept := self._load(row)) is not None:
                    return kept
                self.refresh()
        return None

    def _load(self, row: Row) -> Kept | None:
        path = self._directory / file_name(row["number"], row["level"])
        try:
            with path.open("rb") as file:
                file.seek(row["start"])
                records, _ = read_records(file.read(row["length"]))
        except FileNotFoundError:
            return None
        return unpack_kept(records[0][2])

    def without_text(self) -> list[Kept]:
        """Some of the trajectories whose text is not in the index yet, the newest first."""
        asked = (
            "SELECT * FROM kept WHERE NOT EXISTS (SELECT 1 FROM texts WHERE texts.ticket_id = kept.ticket_id) "
            "ORDER BY finished_at DESC LIMIT 256"
        )
        found, num_bytes = [], 0
        for row in self._ask(asked, ()):
            if num_bytes < _KEPT_BYTES and (kept := self.load(row["ticket_id"])) is not None:
                found.append(kept)
                num_bytes += row["length"]
        return found

    def add_texts(self, texts: Mapping[str, str]) -> None:
        """What was said in trajectories, by ticket."""
        with self._lock:
            self._database.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?)", list(texts.items()))
            self._database.commit()

    def num_with_text(self) -> int:
        """How many can be searched."""
        asked = "SELECT count(*) AS number FROM kept JOIN texts ON texts.ticket_id = kept.ticket_id"
        return int(self._ask(asked, ())[0]["number"])

    def _ask(self, statement: str, values: Sequence[Any]) -> list[Row]:
        with self._lock:
            return [dict(row) for row in self._database.execute(statement, tuple(values))]

    def close(self) -> None:
        """Forget the index."""
        self._database.close()


def _where(chosen: Filter) -> tuple[str, tuple[Any, ...]]:
    clauses = list(chosen.clauses())
    where = " AND ".join(clause for clause, _ in clauses)
    return (f" WHERE {where}" if where else ""), tuple(value for _, value in clauses)


def _facts(kept: Kept) -> tuple[Any, ...]:
    """The columns from group_id on."""
    head, ticket = kept.trajectory.head, kept.trajectory.ticket
    segments = kept.trajectory.segments
    versions = {run[:2] for segment in segments for run in segment.version_runs}
    return (
        ticket.group_id,
        ticket.task.env,
        head.kind,
        ticket.mode.value,
        kept.facts.evaluation,
        kept.facts.step,
        kept.facts.fate,
        head.outcome.value,
        head.reward,
        head.integrity.verdict.value,
        head.num_turns,
        head.num_tool_calls,
        sum(segment.token_ids_T.size for segment in segments),
        kept.trajectory.num_sampled,
        ticket.thinking_budget,
        head.num_forced_stops,
        head.timings_s.get("total"),
        len(versions),
        head.finished_at,
    )
