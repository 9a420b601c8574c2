"""Files and batches of the server, on disk: what they are in SQLite, what they hold beside it."""

from __future__ import annotations

import json
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steer_server.batch.row_file import sync_folder

MAX_FILE_BYTES = 512 << 20
MAX_STORED_BYTES = 16 << 30
FILE_ID = re.compile(r"file-[0-9a-f]{24}")
BATCH_ID = re.compile(r"batch_[0-9a-f]{24}")
OPEN = ("validating", "in_progress", "finalizing", "cancelling")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, number INTEGER, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER,
    filename TEXT NOT NULL, purpose TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, number INTEGER, status TEXT NOT NULL, engine TEXT NOT NULL, body TEXT NOT NULL
);
"""


class NotStoredError(KeyError):
    """No file or batch of that id."""


def now() -> int:
    return int(time.time())


class BatchStore:
    """Ids are drawn here and checked here; no path is ever made of anything else."""

    def __init__(self, folder: Path) -> None:
        """Opens the store in `folder` and creates what is missing. Raises OSError, sqlite3.Error."""
        self._files = folder / "files"
        self._rows = folder / "rows"
        for needed in (self._files, self._rows):
            needed.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._database = folder / "batches.sqlite"
        with self._connected() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        # One for each use: routes run in threads, and several API servers share the file.
        connection = sqlite3.connect(self._database, timeout=30.0, isolation_level="IMMEDIATE")
        connection.row_factory = sqlite3.Row
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    # Files.

    def file_path(self, identifier: str) -> Path:
        if not FILE_ID.fullmatch(identifier):
            raise NotStoredError(identifier)
        return self._files / identifier

    def rows_path(self, batch: str) -> Path:
        """Where a batch's result lines gather while it runs."""
        if not BATCH_ID.fullmatch(batch):
            raise NotStoredError(batch)
        return self._rows / f"{batch}.jsonl"

    def scratch_path(self) -> Path:
        """For a file that is still being received."""
        return self._files / f".{secrets.token_hex(12)}"

    def stored_bytes(self) -> int:
        with self._connected() as connection:
            return int(connection.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()[0])

    def add_file(
        self, scratch: Path, filename: str, purpose: str, expires_at: int | None, identifier: str | None = None
    ) -> dict[str, Any]:
        """Keep what stands in `scratch`. identifier: where it must be a certain one; adding it again replaces it."""
        identifier = identifier or f"file-{secrets.token_hex(12)}"
        size = scratch.stat().st_size
        scratch.rename(self.file_path(identifier))
        sync_folder(self._files)
        with self._connected() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO files "
                "VALUES (?, (SELECT coalesce(max(number), 0) + 1 FROM files), ?, ?, ?, ?, ?)",
                (identifier, size, now(), expires_at, filename, purpose),
            )
        return self.file(identifier)

    def file(self, identifier: str) -> dict[str, Any]:
        """OpenAI's file object. Raises NotStoredError, also for one that has expired."""
        with self._connected() as connection:
            row = connection.execute("SELECT * FROM files WHERE id = ?", (identifier,)).fetchone()
        if row is None:
            raise NotStoredError(identifier)
        if row["expires_at"] is not None and row["expires_at"] <= now():
            self.delete_file(identifier)
            raise NotStoredError(identifier)
        return _file_object(row)

    def files(self, purpose: str | None, after: str | None, limit: int, order: str) -> list[dict[str, Any]]:
        """One more than `limit`, where there are more. Raises NotStoredError for `after`."""
        with self._connected() as connection:
            start = self._number(connection, "files", after)
            found = connection.execute(
                f"""SELECT * FROM files WHERE (expires_at IS NULL OR expires_at > ?) AND (? IS NULL OR purpose = ?)
                AND (? IS NULL OR number {"<" if order == "desc" else ">"} ?)
                ORDER BY number {"DESC" if order == "desc" else "ASC"} LIMIT ?""",
                (now(), purpose, purpose, start, start, limit + 1),
            ).fetchall()
        return [_file_object(row) for row in found]

    def delete_file(self, identifier: str) -> None:
        """Raises NotStoredError."""
        path = self.file_path(identifier)
        with self._connected() as connection:
            if connection.execute("DELETE FROM files WHERE id = ?", (identifier,)).rowcount == 0:
                raise NotStoredError(identifier)
        path.unlink(missing_ok=True)

    def delete_expired(self) -> None:
        with self._connected() as connection:
            gone = connection.execute("SELECT id FROM files WHERE expires_at <= ?", (now(),)).fetchall()
        for row in gone:
            self.delete_file(row["id"])

    # Batches.

    def add_batch(self, fields: dict[str, Any], engine: str) -> dict[str, Any]:
        """engine: what decides the answers, as text; only a server with the same goes on with the batch."""
        identifier = f"batch_{secrets.token_hex(12)}"
        body = {"id": identifier, "object": "batch", **fields}
        with self._connected() as connection:
            connection.execute(
                "INSERT INTO batches VALUES (?, (SELECT coalesce(max(number), 0) + 1 FROM batches), ?, ?, ?)",
                (identifier, fields["status"], engine, json.dumps(body)),
            )
        return body

    def batch(self, identifier: str) -> dict[str, Any]:
        """OpenAI's batch object. Raises NotStoredError."""
        with self._connected() as connection:
            return self._batch(connection, identifier)

    def update_batch(self, identifier: str, only_if: tuple[str, ...], **changes: Any) -> dict[str, Any]:
        """The batch with `changes`, made where its status is one of `only_if`. Raises NotStoredError."""
        with self._connected() as connection:
            # A write first, so that no other process changes what is read next.
            connection.execute("UPDATE batches SET id = id WHERE id = ?", (identifier,))
            body = self._batch(connection, identifier)
            if body["status"] in only_if:
                body |= changes
                connection.execute(
                    "UPDATE batches SET status = ?, body = ? WHERE id = ?",
                    (body["status"], json.dumps(body), identifier),
                )
        return body

    def batches(self, after: str | None, limit: int) -> list[dict[str, Any]]:
        """Newest first, one more than `limit` where there are more. Raises NotStoredError for `after`."""
        with self._connected() as connection:
            start = self._number(connection, "batches", after)
            found = connection.execute(
                "SELECT body FROM batches WHERE (? IS NULL OR number < ?) ORDER BY number DESC LIMIT ?",
                (start, start, limit + 1),
            ).fetchall()
        return [json.loads(row["body"]) for row in found]

    def open_batches(self, engine: str) -> list[str]:
        """Ids of batches of this engine that have not ended, oldest first."""
        marks = ", ".join("?" * len(OPEN))
        with self._connected() as connection:
            found = connection.execute(
                f"SELECT id FROM batches WHERE status IN ({marks}) AND engine = ? ORDER BY number", (*OPEN, engine)
            ).fetchall()
        return [row["id"] for row in found]

    @staticmethod
    def _batch(connection: sqlite3.Connection, identifier: str) -> dict[str, Any]:
        row = connection.execute("SELECT body FROM batches WHERE id = ?", (identifier,)).fetchone()
        if row is None:
            raise NotStoredError(identifier)
        body: dict[str, Any] = json.loads(row["body"])
        return body

    @staticmethod
    def _number(connection: sqlite3.Connection, table: str, after: str | None) -> int | None:
        if after is None:
            return None
        row = connection.execute(f"SELECT number FROM {table} WHERE id = ?", (after,)).fetchone()
        if row is None:
            raise NotStoredError(after)
        return int(row["number"])


def _file_object(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "file",
        "bytes": row["bytes"],
        "created_at": row["created_at"],
        "expires_at": row["expires_at"],
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": "processed",
    }
