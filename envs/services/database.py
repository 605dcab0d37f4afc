"""The world's database: four services' tables in SQLite in memory. Owns the schema; knows no HTTP and no task."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

from envs.rows import Row, Rows

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "products": ("id", "name", "category", "price", "stock"),
    "orders": ("id", "customer", "product_id", "quantity", "status"),
    "events": ("id", "title", "owner", "day", "hour"),
    "tickets": ("id", "subject", "customer", "status", "priority", "assignee"),
    "comments": ("id", "ticket_id", "text"),
    "files": ("id", "path", "owner", "content"),
}
NUMBERS = frozenset({"price", "stock", "product_id", "quantity", "day", "hour", "ticket_id"})
UNIQUE = {"events": ("owner", "day", "hour"), "files": ("path",)}


def _schema() -> str:
    statements = []
    for table, columns in COLUMNS.items():
        parts = ["id INTEGER PRIMARY KEY AUTOINCREMENT"]
        parts += [f"{name} {'INTEGER' if name in NUMBERS else 'TEXT'} NOT NULL" for name in columns[1:]]
        if table in UNIQUE:
            parts.append(f"UNIQUE ({', '.join(UNIQUE[table])})")
        statements.append(f"CREATE TABLE {table} ({', '.join(parts)});")
    return "\n".join(statements)


class Database:
    """One world's rows. Table and column names come from COLUMNS only; values are always bound, never spliced in."""

    def __init__(self, rows: Rows) -> None:
        # An HTTP server's threads use it one after the other, under the world's lock.
        self._db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._db.executescript(_schema())
        for table, columns in COLUMNS.items():
            marks = ", ".join("?" * len(columns))
            self._db.executemany(
                f"INSERT INTO {table} VALUES ({marks})",
                [[row[name] for name in columns] for row in rows.get(table, [])],
            )

    def __enter__(self) -> None:
        self._db.execute("BEGIN")

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")

    def find(self, table: str, where: Mapping[str, Any], limit: int = -1, offset: int = 0) -> list[Row]:
        """The rows with these values, by id."""
        names = COLUMNS[table]
        condition = " AND ".join(f"{self._known(table, name)} = ?" for name in where) or "1"
        found = self._db.execute(
            f"SELECT {', '.join(names)} FROM {table} WHERE {condition} ORDER BY id LIMIT ? OFFSET ?",
            [*where.values(), limit, offset],
        )
        return [dict(zip(names, values, strict=True)) for values in found]

    def count(self, table: str, where: Mapping[str, Any]) -> int:
        """How many rows have these values."""
        condition = " AND ".join(f"{self._known(table, name)} = ?" for name in where) or "1"
        (number,) = self._db.execute(f"SELECT count(*) FROM {table} WHERE {condition}", [*where.values()]).fetchone()
        return int(number)

    def insert(self, table: str, values: Mapping[str, Any]) -> Row:
        """A new row. Raises sqlite3.IntegrityError where its place is taken."""
        names = [self._known(table, name) for name in values]
        marks = ", ".join("?" * len(names))
        cursor = self._db.execute(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", [*values.values()])
        return self.find(table, {"id": cursor.lastrowid})[0]

    def update(self, table: str, row_id: int, values: Mapping[str, Any]) -> Row:
        """A changed row. Raises sqlite3.IntegrityError where its new place is taken."""
        changes = ", ".join(f"{self._known(table, name)} = ?" for name in values)
        self._db.execute(f"UPDATE {table} SET {changes} WHERE id = ?", [*values.values(), row_id])
        return self.find(table, {"id": row_id})[0]

    def delete(self, table: str, row_id: int) -> None:
        """Without the row."""
        self._db.execute(f"DELETE FROM {table} WHERE id = ?", [row_id])

    def rows(self) -> Rows:
        """Everything."""
        return {table: self.find(table, {}) for table in COLUMNS}

    @property
    def last_ids(self) -> dict[str, int]:
        """The highest id that each table ever gave; no new row has a lower one."""
        return {str(table): int(number) for table, number in self._db.execute("SELECT name, seq FROM sqlite_sequence")}

    def set_last_ids(self, last_ids: Mapping[str, int]) -> None:
        """Of a fresh database: give ids above these."""
        for table, number in last_ids.items():
            changed = self._db.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = ?", (number, table))
            if not changed.rowcount:
                self._db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table, number))

    def close(self) -> None:
        """Gone; idempotent."""
        self._db.close()

    @staticmethod
    def _known(table: str, name: str) -> str:
        if name not in COLUMNS[table]:
            raise KeyError(f"{table} has no column {name}")
        return name
