"""The journal: what a crash may leave is dropped, damage is an error, and writers share an fsync."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from megatron_tiedlora.base.files import unguarded
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.service import journal as journal_module
from megatron_tiedlora.service.journal import Journal, Place


def opened(folder: Path) -> tuple[Journal, list[bytes]]:
    journal = Journal(folder, guard=unguarded)
    return journal, [payload for _, payload in journal.records()]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made, payloads = opened(tmp_path)
    assert payloads == []
    made.cut(b"first")
    return made


def last_file(folder: Path) -> Path:
    return sorted(folder.glob("*.journal"))[-1]


def change(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_records_come_back_in_order_over_segments(journal: Journal) -> None:
    wanted = [b"first"]
    for number in range(20):
        if number % 7 == 6:
            journal.cut(b"cut")
            wanted.append(b"cut")
        payload = os.urandom(number * 50)
        place = journal.append(payload)
        journal.sync(place)
        assert journal.read(place) == payload
        wanted.append(payload)
    again, payloads = opened(journal.folder)
    assert payloads == wanted
    assert again.read(place) == payload
    assert again.append(b"x") == Place(place.segment, place.end + 20, 1)


@pytest.mark.parametrize("left", [0, 1, 19, 20, 21, 29])
def test_a_torn_last_record_is_dropped(journal: Journal, left: int) -> None:
    journal.sync(journal.append(b"second"))
    end = journal.size
    journal.append(b"0123456789")
    os.truncate(last_file(journal.folder), end + left)
    again, payloads = opened(journal.folder)
    assert payloads == [b"first", b"second"]
    assert last_file(journal.folder).stat().st_size == end
    again.append(b"third")
    assert opened(journal.folder)[1] == [b"first", b"second", b"third"]


def test_records_that_were_never_synced_may_be_missing_in_any_order(journal: Journal) -> None:
    journal.sync(journal.append(b"second"))
    lost = journal.append(b"lost pages" * 1000)
    journal.append(b"kept pages")
    change(last_file(journal.folder), lost.offset - 20, bytes(lost.length))
    assert opened(journal.folder)[1] == [b"first", b"second"]


@pytest.mark.parametrize("shift", [-20, -16, -12, -4, 0, 5])
def test_damage_of_what_was_synced_is_an_error(journal: Journal, shift: int) -> None:
    place = journal.append(b"second")
    journal.sync(place)
    journal.append(b"third")
    file = last_file(journal.folder)
    byte = file.read_bytes()[place.offset + shift]
    change(file, place.offset + shift, bytes([byte ^ 0x10]))
    with pytest.raises(UserError, match=f"{file}: the record at byte {place.offset - 20} is damaged"):
        opened(journal.folder)


@pytest.mark.parametrize("offset", [3, 8, 16, 30])
def test_damage_of_the_first_record_or_an_earlier_segment_is_an_error(journal: Journal, offset: int) -> None:
    first = last_file(journal.folder)
    journal.append(b"second")
    journal.cut(b"new")
    change(first, offset, b"\x99")
    with pytest.raises(UserError, match=f"{first}: the record at byte 8 is damaged"):
        opened(journal.folder)
    first.unlink()
    assert opened(journal.folder)[1] == [b"new"]
    change(last_file(journal.folder), offset, b"\x99")
    with pytest.raises(UserError, match="the record at byte 8 is damaged"):
        opened(journal.folder)
    last_file(journal.folder).write_bytes(b"")
    with pytest.raises(UserError, match="the record at byte 8 is damaged"):
        opened(journal.folder)


def test_a_payload_cannot_pose_as_a_record(journal: Journal) -> None:
    forged = journal_module._framed(b"forged", 2**40, b"")
    place = journal.append(b"torn here" + forged)
    change(last_file(journal.folder), place.offset, b"T")
    assert opened(journal.folder)[1] == [b"first"]


def test_segments_that_nothing_needs_go(journal: Journal) -> None:
    places = [journal.append(b"one")]
    for _ in range(3):
        journal.cut(b"cut")
        places.append(journal.append(b"more"))
    journal.drop({places[1].segment})
    assert [int(file.stem) for file in sorted(journal.folder.glob("*"))] == [2, 4]
    assert opened(journal.folder)[1] == [b"cut", b"more"] * 2


def test_threads_share_an_fsync(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []

    def slow(path: Path) -> None:
        size = path.stat().st_size
        time.sleep(0.05)
        flushed.append(size)

    monkeypatch.setattr(journal_module, "sync_path", slow)
    begin = threading.Barrier(16)

    def write() -> None:
        begin.wait()
        place = journal.append(b"x" * 100)
        journal.sync(place)
        assert max(flushed) >= place.end

    threads = [threading.Thread(target=write) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(flushed) <= 4
    assert len(opened(journal.folder)[1]) == 17


def test_a_full_disk_leaves_no_half_record(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    calls = iter((3, None))

    def full(descriptor: int, data: memoryview) -> int:
        if (size := next(calls)) is None:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:size])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            journal.append(b"second")
    journal.append(b"third")
    assert opened(journal.folder)[1] == [b"first", b"third"]


def test_after_a_failed_fsync_nothing_is_written(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error")

    place = journal.append(b"second")
    monkeypatch.setattr(journal_module, "sync_path", broken)
    with pytest.raises(OSError, match="Input/output"):
        journal.sync(place)
    monkeypatch.undo()
    for call in (lambda: journal.sync(place), lambda: journal.append(b"third")):
        with pytest.raises(OSError, match="Input/output"):
            call()
