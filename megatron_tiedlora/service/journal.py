"""Keep records on disk that survive a crash, in numbered segments of a folder.

A segment begins with a record of the state before it, and is created with it at once. More records are appended:

    segment = salt (8 bytes) | records
    record = mark (4 bytes) | length of the payload (4) | bytes of the segment already synced (8) | CRC-32 (4) | payload

The CRC begins with the random salt, so that a client cannot put into a payload what looks like a record.

A record that is not complete, with nothing synced behind it, is what a crash leaves: it is dropped. A record that is
damaged although a later one says that it was synced is an error. `desk` decides what the payloads mean.
"""

import logging
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tiedlora.base.files import Guard, new_file, sync_path
from megatron_tiedlora.base.messages import UserError

_MARK = b"\xf1TLJ"
_HEAD = struct.Struct("<4sIQI")
_SUMMED = struct.Struct("<IQ")  # the fields of the head that the CRC covers, before the payload
_SALT_BYTES = 8
_SUFFIX = ".journal"
LARGEST_RECORD = 2**31  # bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a record is: its segment, the offset of its payload, and the payload's bytes."""

    segment: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Return the offset of the next record."""
        return self.offset + self.length


class Journal:
    """The journal in a folder. Its methods can be called from any thread. Call `records` before any other method.

    Files are opened for each call, so that thousands of idle journals need no handles.
    """

    def __init__(self, folder: Path, *, guard: Guard) -> None:
        self.folder = folder
        self.size = 0  # bytes of the last segment
        self._segment = self._synced = 0
        self._salt = b""
        self._guard = guard
        self._changed = threading.Condition()
        self._syncing = False
        self._broken: OSError | None = None  # after a failed fsync nobody knows what is on the disk

    def records(self) -> Iterator[tuple[Place, bytes]]:
        """Yield all records in order, with their places. Then drop what a crash left behind the last one.

        Raises:
            UserError: a record is damaged. The message has the file and the record's offset.
        """
        segments = sorted(int(file.stem) for file in self.folder.glob(f"*{_SUFFIX}"))
        for segment in segments:
            path, end, size, torn = self._path(segment), _SALT_BYTES, self._path(segment).stat().st_size, False
            if size:
                with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    while (place := _intact(data, segment, end)) is not None:
                        end = place.end
                        yield place, data[place.offset : end]
                    begun = segment == segments[-1] and end > _SALT_BYTES
                    torn, self._salt = begun and not _was_synced(data, segment, end), data[:_SALT_BYTES]
            if not torn and end != size:
                raise UserError(
                    f"{path}: the record at byte {end} is damaged; restore the file from a copy, or move the folder"
                    f" {self.folder} away to do without it"
                )
            self._segment, self.size = segment, end
        if segments:
            path = self._path(self._segment)
            if self.size < path.stat().st_size:
                logger.warning("%s: dropped an incomplete record at byte %d", path, self.size)
                os.truncate(path, self.size)
            sync_path(path)
            self._synced = self.size

    def append(self, payload: bytes) -> Place:
        """Append a record and return its place. It survives the end of this process, and after `sync` a power failure.

        Raises:
            OSError: the record could not be written.
        """
        with self._changed:
            if self._broken is not None:
                raise self._broken
            self._guard()
            descriptor = os.open(self._path(self._segment), os.O_WRONLY | os.O_CLOEXEC)
            try:
                left = memoryview(_framed(payload, self._synced, self._salt))
                place = Place(self._segment, self.size + _HEAD.size, len(payload))
                os.lseek(descriptor, self.size, os.SEEK_SET)
                while left:
                    left = left[os.write(descriptor, left) :]
            finally:
                os.close(descriptor)
            self.size = place.end  # after an error the next record overwrites what was written
            return place

    def sync(self, place: Place) -> None:
        """Wait until the record at `place` is on the disk. One fsync serves all threads that wait for it.

        Raises:
            OSError: the disk failed. No record can be appended any more.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._syncing or self._covers(place))
                if self._broken is not None:
                    raise self._broken
                if self._covers(place):
                    return
                self._syncing, segment, end = True, self._segment, self.size
            try:
                self._flush(segment)
            finally:
                with self._changed:
                    self._syncing = False
                    if segment == self._segment and self._broken is None:
                        self._synced = max(self._synced, end)
                    self._changed.notify_all()

    def _flush(self, segment: int) -> None:
        try:
            sync_path(self._path(segment))
        except OSError as error:
            self._broken = error
            raise

    def _covers(self, place: Place) -> bool:
        return place.segment < self._segment or place.end <= self._synced

    def read(self, place: Place) -> bytes:
        """Return the payload at a place of this journal whose segment was not dropped."""
        with self._path(place.segment).open("rb") as stream:
            stream.seek(place.offset)
            return stream.read(place.length)

    def cut(self, first: bytes) -> None:
        """Begin a segment with the record `first`. All earlier records are on the disk afterwards."""
        with self._changed:
            if self._segment:
                self._flush(self._segment)
            self._salt = os.urandom(_SALT_BYTES)
            content = self._salt + _framed(first, 0, self._salt)
            with new_file(self._path(self._segment + 1), guard=self._guard) as temporary:
                temporary.write_bytes(content)
            self._segment += 1
            self.size = self._synced = len(content)
            self._changed.notify_all()

    def drop(self, used: Collection[int]) -> None:
        """Remove the segments before the last one that are not among `used`."""
        with self._changed:
            self._guard()
            for file in self.folder.glob(f"*{_SUFFIX}"):
                if int(file.stem) < self._segment and int(file.stem) not in used:
                    file.unlink()

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:08}{_SUFFIX}"


def _framed(payload: bytes, synced: int, salt: bytes) -> bytes:
    assert len(payload) < LARGEST_RECORD, f"a record of {len(payload)} bytes"
    checksum = zlib.crc32(payload, zlib.crc32(salt + _SUMMED.pack(len(payload), synced)))
    return _HEAD.pack(_MARK, len(payload), synced, checksum) + payload


def _intact(data: mmap.mmap, segment: int, offset: int) -> Place | None:
    """Return the place of the intact record whose head is at `offset`, or None if there is no such record."""
    if offset + _HEAD.size > len(data):
        return None
    mark, length, synced, checksum = _HEAD.unpack_from(data, offset)
    place = Place(segment, offset + _HEAD.size, length)
    if mark != _MARK or place.end > len(data):
        return None
    head = data[:_SALT_BYTES] + _SUMMED.pack(length, synced)
    found = zlib.crc32(data[place.offset : place.end], zlib.crc32(head))
    return place if found == checksum else None


def _was_synced(data: mmap.mmap, segment: int, offset: int) -> bool:
    """Return whether an intact record behind `offset` says that the bytes at `offset` were synced before it."""
    head = data.find(_MARK, offset + 1)
    while head >= 0:
        if _intact(data, segment, head) is not None and _HEAD.unpack_from(data, head)[2] > offset:
            return True
        head = data.find(_MARK, head + 1)
    return False
