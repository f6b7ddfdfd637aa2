"""The desk's folder and database: damage, other programs' files and other versions are one clear line; many threads."""

from __future__ import annotations

import random
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from support.desk_engine import CREATE, HashEngine, one_pass, step

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import FolderTaken
from megatron_tiedlora.service.database import DATABASE_FILE
from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.operations import OperationResult, Step
from megatron_tiedlora.service.records import Answered, Limits


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
    assert "has format 7, not 2" in refusal(file)
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


def test_threads_of_clients_beside_the_engine(tmp_path: Path) -> None:
    """Each client sends a window in a random order and waits for its answers; the engine saves states meanwhile."""
    desk = Desk.open(tmp_path / "state", Limits())
    engine, over, found = HashEngine(desk), threading.Event(), dict[str, OperationResult]()

    def serve() -> None:
        while not over.is_set():
            tickets = desk.ready(0.05)
            for ticket in tickets:
                desk.answer(ticket.request, engine.run(ticket))
            for model in {ticket.model for ticket in tickets if isinstance(ticket.operation, Step)}:
                engine.save(model)

    def client(index: int) -> None:
        owner, draw = ("ann", "bob")[index % 2], random.Random(index)
        session = desk.open_session(owner, metadata={})
        desk.create(owner, session, 0, CREATE, info={})
        model = f"{session}:train:0"
        for begin in range(1, 41, 4):
            sent = {}
            for number in draw.sample(range(begin, begin + 4), 4):
                operation = step() if number == begin + 3 else one_pass(20 + number)
                sent[number] = desk.submit(owner, model, number, operation)
            for _, request in sorted(sent.items()):
                done = threading.Event()
                desk.when_done(request, done.set)
                assert done.wait(60)
                answer = desk.answer_of(owner, request)
                assert isinstance(answer, Answered)
                desk.taken(owner, request)
        found[model] = answer.result

    threads = [threading.Thread(target=serve), *(threading.Thread(target=client, args=(index,)) for index in range(4))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join(120)
    over.set()
    threads[0].join(10)
    desk.close()
    assert not any(thread.is_alive() for thread in threads)
    assert len(found) == 4 and len({repr(result) for result in found.values()}) == 1
