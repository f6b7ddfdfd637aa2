"""The SQLite database of a training service: its tables, and transactions that survive a crash.

SQLite's exclusive mode needs no shared memory, so the file can be on a network file system. A transaction that is not
`durable` is atomic too. Only a power failure can undo it, until the next durable one, which syncs the whole log.

Below the folder of the service, which can be moved while the service is stopped:

    desk.sqlite                               all that the desk remembers
    models/MODEL/state/NUMBER                 a state that the engine has saved
    models/MODEL/weights/NAME, sampler_weights/NAME
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Row
from typing import Any

from megatron_tiedlora.base.files import Guard, sync_path
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.parallel.agreement import packed, unpacked
from megatron_tiedlora.service import operations
from megatron_tiedlora.service.operations import OperationResult
from megatron_tiedlora.service.records import Limits, Refused, known

DATABASE_FILE = "desk.sqlite"
_FORMAT = 2  # version of the schema, stored as SQLite's `user_version`
_APPLICATION = 0x544C6465  # stored as SQLite's `application_id`
_LOG_BYTES = 2**26  # size to which the log's file shrinks after a large transaction

_SCHEMA = Path(__file__).with_name("schema.sql")

# The end of a window of backward passes (`model_queue`). A load that failed leaves them.
ENDS_WINDOW = "kind IN ('Step', 'Load') AND (kind = 'Step' OR result_kind NOT IN ('', 'Failure'))"
_OVER = "SELECT key FROM sessions WHERE ended <= ?1 AND (finished OR ended <= ?2)"
# Operations that are part of their model's saved state, and not of its window
_NEEDLESS = f"""number <= (SELECT saved FROM models WHERE model = queue) AND NOT ((backward OR {ENDS_WINDOW})
    AND number >= COALESCE((SELECT number FROM operations AS ends WHERE ends.queue = operations.queue AND {ENDS_WINDOW}
        AND number <= (SELECT saved FROM models WHERE model = ends.queue) ORDER BY number DESC LIMIT 1), 0))"""
_WAITING = "FROM operations WHERE result_kind = ''"
_GAUGES = {
    "sessions": "COUNT(*) FROM sessions WHERE ended IS NULL",
    "models": "COUNT(*) FROM models",
    "samplers": "COUNT(*) FROM samplers",
    "requests_waiting": f"COUNT(*) {_WAITING}",
    "answers_kept": "COUNT(*) FROM operations WHERE result_kind != '' AND COALESCE(taken > :gone, 1)",
    "queued_bytes": "COALESCE(SUM(queued), 0) FROM sizes",
    "kept_bytes": "COALESCE(SUM(kept), 0) FROM sizes",
    "saved_weights": "COUNT(*) FROM weights",
    "saved_weights_bytes": "COALESCE(SUM(size), 0) FROM weights",
}


def unusable(file: Path, why: object) -> UserError:
    """Return the error for a database that cannot be used."""
    return UserError(f"{file}: {why}; restore it from a copy, or give another folder")


class Database:
    """The database of a service. Only one thread at a time may call a method."""

    def __init__(self, folder: Path, guard: Guard) -> None:
        """Open the database in a folder, or create it if the folder is new. `guard` is called before each commit.

        Raises:
            UserError: the file is missing, or not a database of this version.
            sqlite3.Error: the file cannot be used; see `unusable`. Most methods can raise this.
        """
        self.file, self._guard = folder / DATABASE_FILE, guard
        self._connection = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = Row
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.run("PRAGMA locking_mode = EXCLUSIVE")
        found = self.value("PRAGMA application_id"), self.value("PRAGMA user_version")
        new = not self.value("SELECT COUNT(*) FROM sqlite_master")
        if new and any(self.file.parent.glob("models/*")):
            raise unusable(self.file, "is missing or empty")
        if not new and found != (_APPLICATION, _FORMAT):
            why = f"has format {found[1]}, not {_FORMAT}"
            raise unusable(self.file, why if found[0] == _APPLICATION else "is not of a training service")
        self.run("PRAGMA journal_mode = WAL")
        self.run("PRAGMA foreign_keys = ON")
        self.run(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        if new:
            with self.transaction():
                for statement in _SCHEMA.read_text().split("\nCREATE")[1:]:
                    self.run(f"CREATE{statement}")
                self.run(f"PRAGMA application_id = {_APPLICATION}")
                self.run(f"PRAGMA user_version = {_FORMAT}")
            sync_path(self.file.parent)

    def close(self) -> None:
        """Close the file. A second call has no effect."""
        self._connection.close()

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[None]:
        """Commit all changes in the block, or none if it raises an error. `durable` ones are synced to the disk."""
        self.run(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self.run("BEGIN")
        try:
            yield
            self._guard()
            self.run("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self.run("ROLLBACK")
            raise

    def run(self, sql: str, *values: Any) -> sqlite3.Cursor:
        """Run a statement."""
        return self._connection.execute(sql, values)

    def row(self, sql: str, *values: Any) -> Row | None:
        """Return the first row of a query, or None."""
        found: list[Row] = self.run(f"{sql} LIMIT 1", *values).fetchall()
        return found[0] if found else None

    def value(self, sql: str, *values: Any) -> Any:
        """Return the first value of a query."""
        return self.run(sql, *values).fetchone()[0]

    def column(self, sql: str, *values: Any) -> list[Any]:
        """Return the first value of each row of a query."""
        return [row[0] for row in self.run(sql, *values).fetchall()]

    def put(self, table: str, **values: Any) -> None:
        """Insert a row, or replace the one with its key."""
        names, marks = ", ".join(f'"{name}"' for name in values), ", ".join("?" * len(values))
        self.run(f"REPLACE INTO {table}({names}) VALUES ({marks})", *values.values())

    def session(self, owner: str, session: str) -> Row:
        """Return the row of an owner's session. Raise Refused if it is unknown."""
        return known(self.row("SELECT * FROM sessions WHERE key = ? AND owner = ?", session, owner), "session", session)

    def touch(self, owner: str, session: str, now: float) -> None:
        """Keep a session alive, or bring it back. Raise Refused if it is unknown or was finished."""
        if self.session(owner, session)["finished"]:
            raise Refused(410, f"the session {session} was finished; open a new one")
        self.run("UPDATE sessions SET seen = ?, ended = NULL WHERE key = ?", now, session)

    def queued(self, owner: str) -> int:
        """Return the bytes of an owner's operations that have no answer."""
        return int(self.value("SELECT COALESCE(SUM(queued), 0) FROM sizes WHERE owner = ?", owner))

    def stored(self, owner: str) -> int:
        """Return the bytes of an owner's operations, their results, and saved weights."""
        both = "SELECT kept FROM sizes WHERE owner = ?1 UNION ALL SELECT size FROM weights WHERE owner = ?1"
        return int(self.value(f"SELECT COALESCE(SUM(kept), 0) FROM ({both})", owner))

    def gauges(self, gone: float) -> dict[str, float]:
        """Return numbers about the service by name. `gone` is the time up to which fetched answers are forgotten."""
        return {
            name: self._connection.execute(f"SELECT {what}", {"gone": gone}).fetchone()[0]
            for name, what in _GAUGES.items()
        }

    def forget(self, limits: Limits, now: float, is_busy: Callable[[str], bool]) -> list[str]:
        """Forget answers, sessions whose time is over, and their models unless one is busy. Return these models."""
        times = now - limits.answer_seconds, now - limits.model_seconds
        lapse = "UPDATE sessions SET ended = seen + ?1 WHERE ended IS NULL AND seen + ?1 <= ?2"
        self.run(lapse, limits.idle_seconds, now)
        over = self.column(f"SELECT model FROM models WHERE session IN ({_OVER})", *times)
        gone = [model for model in over if not is_busy(model)]
        for model in gone:
            self.run("DELETE FROM operations WHERE queue = ?", model)
            self.run("DELETE FROM models WHERE model = ?", model)
        for table, column in (("samplers", "session"), ("sessions", "key")):
            empty = f"{column} IN ({_OVER} EXCEPT SELECT session FROM models)"
            self.run(f"DELETE FROM {table} WHERE {empty}", *times)
        self.run(f"DELETE FROM operations WHERE taken <= ? AND (kind = 'Sample' OR {_NEEDLESS})", times[0])
        orphans = "kind = 'Sample' AND result_kind != '' AND queue NOT IN (SELECT key FROM samplers)"
        self.run(f"DELETE FROM operations WHERE {orphans}")
        return gone

    def answer(self, request: str, result: OperationResult) -> None:
        """Add the result of an operation."""
        kind, value = type(result).__name__, packed(result)
        self.run("UPDATE operations SET result_kind = ?, size = size + ? WHERE request = ?", kind, len(value), request)
        self.put("results", request=request, value=value)

    def operation(self, future: Row) -> Any:
        """Return the operation of a row, which was not rejected."""
        return self._content("bodies", future["request"], future["kind"])

    def result(self, future: Row) -> Any:
        """Return the result of the operation of a row, which is answered."""
        return self._content("results", future["request"], future["result_kind"])

    def _content(self, table: str, request: str, kind: str) -> Any:
        value = self.value(f"SELECT value FROM {table} WHERE request = ?", request)
        try:
            return unpacked(getattr(operations, kind), value, sender=0)
        except UserError:
            raise unusable(self.file, f"the row {request} of {table} is damaged") from None
