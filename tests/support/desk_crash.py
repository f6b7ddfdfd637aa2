"""What a crash leaves of the folder of a desk."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_tiedlora.base import files
from megatron_tiedlora.service.database import DATABASE_FILE, Database
from megatron_tiedlora.service.desk import Desk

PAGE = 4096
Mark = tuple[bytes, int]


def written(database: Database) -> Mark:
    """The salts of the database's log, and the end of the frames that have them."""
    log = database.file.with_name(f"{DATABASE_FILE}-wal")
    raw, end = log.read_bytes() if log.exists() else b"", 32
    salts = raw[16:24]
    while salts and raw[end + 8 : end + 16] == salts:
        end += 24 + PAGE
    return salts, end


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[Database, Mark]:
    """Up to where the logs of databases were synced. No fsync takes place. Only tests move a log into its database."""
    marks: dict[Database, Mark] = {}
    opened, transaction, run = Database._open, Database.transaction, Database.run

    def run_without_fsync(self: Database, sql: str, *values: Any) -> Any:
        return run(self, "PRAGMA synchronous = OFF" if sql.startswith("PRAGMA synchronous") else sql, *values)

    def open_without_checkpoints(self: Database) -> None:
        self.run("PRAGMA synchronous = OFF")
        self.run("PRAGMA wal_autocheckpoint = 0")
        opened(self)

    @contextmanager
    def marking(self: Database, *, durable: bool = True) -> Iterator[None]:
        with transaction(self, durable=durable):
            yield
        if durable:
            marks[self] = written(self)

    monkeypatch.setattr(files, "sync_path", lambda path: None)
    monkeypatch.setattr(Database, "run", run_without_fsync)
    monkeypatch.setattr(Database, "_open", open_without_checkpoints)
    monkeypatch.setattr(Database, "transaction", marking)
    return marks


def crashed(
    desk: Desk, folder: Path, draw: random.Random | None = None, synced: dict[Database, Mark] | None = None
) -> None:
    """Copy the folder of a desk as a crash leaves it, and close the desk. With `draw`, the power failed: of what was
    not synced there is a part of random length, perhaps with rubbish behind it."""
    shutil.copytree(desk._folder, folder, ignore=shutil.ignore_patterns(".owner*"))
    log = folder / f"{DATABASE_FILE}-wal"
    if draw and synced and log.exists():
        salts, end = written(desk._database)
        old_salts, old_end = synced[desk._database]
        kept = draw.randint(old_end if old_salts == salts else 0, end)
        log.write_bytes(log.read_bytes()[:kept] + draw.choice((b"", bytes(50), b"rubbish" * 1000)))
    desk.close()
