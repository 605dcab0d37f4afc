"""Tables as plain rows, and what has changed between two states of them: what graders of databases compare. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Rows = dict[str, list[Row]]
Change = tuple[str, int | None, Mapping[str, Any] | None]
"""Table, id, new values. Without an id a new row, without values none."""


def differences(before: Rows, after: Rows) -> dict[str, list[Row]]:
    """What was changed between two states: table -> changed, new and (as `{"gone": id}`) deleted rows.

    Ids of new rows are left out: they depend on the order and number of attempts, which is nobody's task. New rows are
    sorted by content, so that two sets of changes are equal when they come to the same.
    """
    found: dict[str, list[Row]] = {}
    for table in {**before, **after}:
        old = {row["id"]: row for row in before.get(table, [])}
        new = {row["id"]: row for row in after.get(table, [])}
        changed: list[Row] = [row for key, row in new.items() if key in old and row != old[key]]
        created = [
            {name: value for name, value in row.items() if name != "id"} for key, row in new.items() if key not in old
        ]
        changes = [*changed, *sorted(created, key=repr), *({"gone": key} for key in old if key not in new)]
        if changes:
            found[table] = changes
    return found


def applied(rows: Rows, changes: Sequence[Change]) -> Rows:
    """The rows after these changes."""
    state = {table: {row["id"]: dict(row) for row in kept} for table, kept in rows.items()}
    for table, row_id, values in changes:
        if row_id is None:
            number = max(state[table], default=0) + 1
            state[table][number] = {"id": number, **(values or {})}
        elif values is None:
            del state[table][row_id]
        else:
            state[table][row_id] |= values
    return {table: [kept[key] for key in sorted(kept)] for table, kept in state.items()}


def compared(before: Rows, expected: Rows, found: Rows) -> dict[str, float]:
    """A final state's marks. correct: exactly what was asked for has changed; finished: all of that; untouched:
    nothing else."""
    wanted, changed = differences(before, expected), differences(before, found)
    finished = all(row in changed.get(table, []) for table, rows in wanted.items() for row in rows)
    untouched = all(row in wanted.get(table, []) for table, rows in changed.items() for row in rows)
    return {
        "correct": float(changed == wanted),
        "finished": float(finished),
        "untouched": float(untouched),
    }
