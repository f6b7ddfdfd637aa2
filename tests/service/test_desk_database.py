"""The desk's folder and database: damage, another program's file and another version are one clear line."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.desk_engine import CREATE, one_pass

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import FolderTaken
from megatron_tiedlora.service.database import DATABASE_FILE
from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.records import Limits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The database of a service that has a model with an operation."""
    desk = Desk.open(tmp_path / "state", Limits())
    session = desk.open_session("ann", metadata={})
    desk.create("ann", session, 0, CREATE, info={})
    desk.submit("ann", f"{session}:train:0", 1, one_pass(7))
    desk.close()
    return tmp_path / "state" / DATABASE_FILE


def refusal(file: Path) -> str:
    """Why a service does not start."""
    with pytest.raises(UserError) as caught:
        desk = Desk.open(file.parent, Limits())
        with closing(desk):
            desk.ready(0)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"{file}: ")
    assert said.endswith("; restore it from a copy, or give another folder")
    return said


def changed(file: Path, sql: str) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute(sql)


def test_the_folder_is_private_and_has_one_owner(file: Path, tmp_path: Path) -> None:
    with closing(Desk.open(file.parent, Limits())), pytest.raises(FolderTaken):
        Desk.open(file.parent, Limits())
    assert file.parent.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="not a private folder"):
        Desk.open(tmp_path / "link", Limits())


def test_a_file_that_is_no_database(file: Path) -> None:
    file.write_bytes(b"no database" * 1000)
    assert "file is not a database" in refusal(file)


@pytest.mark.parametrize("page", [1, 2])  # the schema, and the sessions
def test_damaged_pages(file: Path, page: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[4096 * (page - 1) + 100 : 4096 * page] = b"\xff" * 3996
    file.write_bytes(raw)
    assert "cannot be used" in refusal(file)


def test_a_damaged_body(file: Path) -> None:
    changed(file, "UPDATE bodies SET value = x'00'")
    assert "of bodies is damaged" in refusal(file)


def test_the_database_of_another_program_or_version(file: Path) -> None:
    changed(file, "PRAGMA user_version = 7")
    assert "has format 7, not 1" in refusal(file)
    changed(file, "PRAGMA application_id = 7")
    assert "is not of a training service" in refusal(file)


def test_a_database_that_is_missing(file: Path) -> None:
    (file.parent / "models" / "some").mkdir(parents=True)
    for remove in (lambda: file.write_bytes(b""), file.unlink):
        remove()
        assert "is missing or empty" in refusal(file)


def test_a_database_that_another_program_has_open(file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert "database is locked" in refusal(file)
