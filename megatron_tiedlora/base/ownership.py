"""One writer per folder: which start (one launch of a command) may change its content.

OWNER_FILE holds a token (start id, host, process, time). The owner keeps the file locked; the kernel frees the lock
when the owner dies. It also renews the file's mtime, which other hosts see. A start that takes over a folder replaces
the file without waiting, and the former owner finds the other token before its next change.

A check comes right before each rename of a temporary file (`atomic`), and a new owner removes temporary files before
it reads the folder. So an owner that is suspended between its check and its rename changes nothing when it wakes up.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_tiedlora.base.atomic import TEMPORARY_PREFIX
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import Count, Text, read_fields, read_json_object

OWNER_FILE = ".owner"
_GIVEN_UP, _CANDIDATE = f"{OWNER_FILE}-given-up-", f"{OWNER_FILE}-new-"  # followed by a start id
STALE_SECONDS = 60.0  # an owner counts as given up if it has not renewed its token for so long
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class FolderTaken(UserError):
    """Another start owns the folder."""


class OwnerLost(UserError):
    """This start no longer owns the folder: another took it over, its peers gave it up, or the folder is gone."""


@dataclass(frozen=True)
class Token:
    """The content of OWNER_FILE: who owns the folder.

    Attributes:
        start: unique id of the start.
        machine: id of the running kernel, whose lock tells whether the owner lives.
        since: when it took the folder, in seconds since 1970 by its own clock.
    """

    start: Text
    host: Text
    pid: Count
    machine: Text
    since: Annotated[float, Field(strict=True, ge=0, le=1e11)]

    def __str__(self) -> str:
        return f"a start on {self.host} (process {self.pid})"

    @property
    def time(self) -> str:
        """`since` in words."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))


@dataclass(frozen=True)
class Owner:
    """A start that owns a folder, as seen by each of its ranks.

    Attributes:
        is_main: whether this rank holds the lock, which the other ranks may give up.
    """

    folder: Path
    start: str
    is_main: bool = True

    def check(self) -> None:
        """Raise OwnerLost if this start may no longer change the folder."""
        if not self._is_named():
            token = read_token(self.folder)
            if token is not None:
                why = f"{token} took it over at {token.time}"
            elif self.folder.is_dir():
                why = f"its file {OWNER_FILE} is gone"
            else:
                why = "the folder was removed, moved or replaced"
            raise OwnerLost(f"{self.folder}: {why}; this start changed nothing more there")
        if self.is_main and self._mark.exists():
            raise OwnerLost(
                f"{self.folder}: the other ranks gave this one up because it was silent; this start changed nothing"
                " more there"
            )

    def _is_named(self) -> bool:
        """Whether the folder's token is this start's. It is read before every change, so only the id is checked."""
        for _ in range(3):
            try:
                descriptor = os.open(self.folder / OWNER_FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    return bool(json.loads(os.read(descriptor, 4096)).get("start") == self.start)
                finally:
                    os.close(descriptor)
            except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
                return False
            except OSError:  # a network file system may fail for a moment
                time.sleep(0.5)
        return False

    def give_up(self) -> None:
        """Let the next start with --resume take the folder, even if the lock's holder may wake up. Best effort."""
        with suppress(OSError, UserError):
            token = read_token(self.folder)
            if token is not None and token.start == self.start:
                self._mark.touch()

    @property
    def _mark(self) -> Path:
        return self.folder / f"{_GIVEN_UP}{self.start}"


@dataclass
class FolderLock:
    """A folder that this process owns until `release`.

    Attributes:
        descriptor: the locked file. Children that inherit it keep the kernel's lock while they live.
        renew_seconds: time between renewals of the token.
        lock_seconds: longest wait for a lock that processes of this machine hold only for a moment.
    """

    owner: Owner
    descriptor: int
    renew_seconds: float
    lock_seconds: float
    _made: tuple[Path, ...] = ()
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._renew, name="folder-lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        while not self._over.wait(self.renew_seconds):
            with suppress(OSError):
                os.utime(self.descriptor)

    def release(self) -> None:
        """Give up the folder, unless a child still holds the lock. Folders that `take_folder` made go if empty."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join(self.lock_seconds)
        os.close(self.descriptor)
        with suppress(OSError, UserError), _one_at_a_time(self.owner.folder, self.lock_seconds):
            token, file = read_token(self.owner.folder), self.owner.folder / OWNER_FILE
            if token is not None and token.start == self.owner.start and _is_unlocked(file) is not False:
                _remove_marks(self.owner.folder)
                file.unlink(missing_ok=True)
        for made in self._made:
            try:
                made.rmdir()
            except OSError:
                break


def take_folder(
    folder: Path,
    *,
    hint: str,
    new: bool = False,
    resumes: bool = False,
    take_over: bool = False,
    removed_after: bool = False,
    before: Callable[[], None] = lambda: None,
    renew_seconds: float = 10.0,
    lock_seconds: float = 5.0,
) -> FolderLock:
    """Become the owner of a folder, which is created if it does not exist.

    A folder is free if nobody owns it, or if its owner died on this machine. It can also be taken if its owner was
    given up (by its peers, or because the token was not renewed for STALE_SECONDS). While the kernel's lock is held,
    only a start that resumes may do that.

    Args:
        hint: what a user can do if it is owned, for the message.
        new: the folder must not exist yet.
        take_over: take it, whoever owns it.
        before: called before the folder is taken from an earlier start; if it raises, that start keeps the folder.
        removed_after: `release` removes the folder if it is empty, whoever made it.
        renew_seconds, lock_seconds: see FolderLock.

    Raises:
        FolderTaken: another start owns it; the message says which one and since when.
        FileExistsError: it exists, and `new` is set.
        UserError: it cannot be created or written.
    """
    made = _make(folder, new=new)
    token = Token(uuid.uuid4().hex[:16], socket.gethostname(), os.getpid(), _machine(), time.time())
    temporary = folder / f"{_CANDIDATE}{token.start}"
    descriptor = None
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o664)
        with suppress(OSError):  # a file system without locks: then only the token's mtime counts
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, json.dumps(asdict(token)).encode())  # a token without a lock is of a dead start
        with _one_at_a_time(folder, lock_seconds):
            _put_token(temporary, resumes=resumes, take_over=take_over, hint=hint, before=before)
        removed = (folder, *made[1:]) if removed_after else made
        return FolderLock(Owner(folder, token.start), descriptor, renew_seconds, lock_seconds, removed)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
        raise


def _make(folder: Path, *, new: bool) -> tuple[Path, ...]:
    """Create the folder and its parents. Returns those that were created, the innermost first."""
    made: list[Path] = []
    try:
        for path in (*reversed(folder.parents), folder):
            if path.is_dir() and not (new and path == folder):
                continue
            try:
                path.mkdir()
                made.insert(0, path)
            except FileExistsError:
                if new and path == folder:
                    raise
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error})") from error
    return tuple(made)


def _put_token(temporary: Path, *, resumes: bool, take_over: bool, hint: str, before: Callable[[], None]) -> None:
    """Rename `temporary`, which holds a token, to OWNER_FILE if the folder may be taken."""
    folder = temporary.parent
    owned = folder / OWNER_FILE
    try:
        os.link(temporary, owned)  # fails if there is a token, even one that another host has just written
    except OSError:  # a token exists, or the file system has no hard links
        if not take_over:
            _reject_owned(folder, now=temporary.stat().st_mtime, resumes=resumes, hint=hint)
        before()
        os.replace(temporary, owned)
    else:
        temporary.unlink()
    _remove_marks(folder)


def _reject_owned(folder: Path, *, now: float, resumes: bool, hint: str) -> None:
    """Raise FolderTaken unless the folder's owner is dead or was given up.

    Args:
        now: mtime of a file that was just written there, since the clocks of hosts differ.
    """
    token, free = read_token(folder), _is_unlocked(folder / OWNER_FILE)
    if token is not None and _is_dead(folder, token):
        return
    try:
        renewed = (folder / OWNER_FILE).stat().st_mtime
    except OSError:  # released meanwhile
        return
    marked = token is not None and (folder / f"{_GIVEN_UP}{token.start}").exists()
    if (marked or now - renewed > STALE_SECONDS) and (resumes or free is not False):
        return
    who = "another start" if token is None else f"{token} since {token.time}"
    raise FolderTaken(f"{folder}: {who} is at work here (last seen {max(0.0, now - renewed):.0f} s ago); {hint}")


def _is_dead(folder: Path, token: Token, name: str = OWNER_FILE) -> bool:
    """Whether the start whose token the file `name` holds ran on this machine and died."""
    return token.machine == _machine() and _is_unlocked(folder / name) is True


def owner_in_words(folder: Path) -> str | None:
    """Who owns the folder and since when. None if nobody does, or if its owner is known to be dead."""
    token = read_token(folder)
    return None if token is None or _is_dead(folder, token) else f"{token} since {token.time}"


def read_token(folder: Path, name: str = OWNER_FILE) -> Token | None:
    """The token in a file of the folder, or None if there is no readable one."""
    file = folder / name
    try:
        return read_fields(file, read_json_object(file, kind="an owner's token"), Token)
    except (UserError, OSError):
        return None


def is_of_owner(name: str) -> bool:
    """Whether a file of this name only records who owns the folder, or is temporary."""
    return name.startswith((OWNER_FILE, TEMPORARY_PREFIX))


def _is_unlocked(file: Path) -> bool | None:
    """Whether no process holds the kernel's lock on the file. None if that cannot be determined."""
    for mode, lock in ((os.O_RDWR, fcntl.LOCK_EX), (os.O_RDONLY, fcntl.LOCK_SH)):
        try:
            descriptor = os.open(file, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError:
            continue
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            return None
        finally:
            os.close(descriptor)
    return None


@contextmanager
def _one_at_a_time(folder: Path, seconds: float) -> Iterator[None]:
    """Exclude other processes of this machine, if the file system can lock folders (network ones may not)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + seconds  # the holder may be suspended; tokens are safe enough without it
        with suppress(OSError):
            while not _try_lock(descriptor) and time.monotonic() < deadline:
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_marks(folder: Path) -> None:
    """Remove the marks of former owners, and tokens of starts that were killed while they took the folder."""
    for mark in (*folder.glob(f"{_GIVEN_UP}*"), *folder.glob(f"{_CANDIDATE}*")):
        with suppress(OSError):
            token = read_token(folder, mark.name)
            dead = token is not None and _is_dead(folder, token, mark.name)
            if mark.name.startswith(_GIVEN_UP) or dead or time.time() - mark.stat().st_mtime > STALE_SECONDS:
                mark.unlink()


@cache
def _machine() -> str:
    """An id of the running kernel, whose locks all its processes share; containers differ in host name."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
