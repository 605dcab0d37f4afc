"""The office's state, on the server's side: tables of rows that pages read and forms change. Knows no HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from envs.rows import Row, Rows


class Store:
    """One office's rows. Given rows are copied."""

    def __init__(self, rows: Rows) -> None:
        self._tables = {table: {row["id"]: dict(row) for row in kept} for table, kept in rows.items()}

    def all(self, table: str) -> list[Row]:
        """All rows, by id."""
        kept = self._tables[table]
        return [kept[key] for key in sorted(kept)]

    def find(self, table: str, number: int) -> Row | None:
        """The row of this id, if there is one."""
        return self._tables[table].get(number)

    def change(self, table: str, number: int, values: Mapping[str, Any]) -> None:
        """New values of a row that is there."""
        self._tables[table][number] |= values

    def add(self, table: str, values: Mapping[str, Any]) -> int:
        """A new row; its id."""
        number = max(self._tables[table], default=0) + 1
        self._tables[table][number] = {"id": number, **values}
        return number

    def artifact(self) -> bytes:
        """The whole state as JSON, which leaves for the verifier."""
        return json.dumps({table: self.all(table) for table in self._tables}, sort_keys=True).encode()
