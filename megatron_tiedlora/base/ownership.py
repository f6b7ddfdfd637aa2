"""One writer per folder: which start (one launch of a command) may change its content.

OWNER_FILE holds a token (start id, host, process, time). The owner keeps the file locked; the kernel frees the lock
when the owner dies. It also renews the file's mtime, which other hosts see. A start that takes over a folder replaces
the file without waiting, and the former owner finds the other token before its next change.

A check comes right before each rename of a temporary file (`files`), and a new owner removes temporary files before
it reads the folder. So an owner that is suspended between its check and its rename changes nothing when it wakes up.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

import psutil
from pydantic import Field

from megatron_tiedlora.base.files import TEMPORARY_PREFIX, Count, Text, read_fields, read_json_object
from megatron_tiedlora.base.messages import UserError

OWNER_FILE = ".owner"
START_ID = "MEGATRON_TIEDLORA_START"  # the variable by which `tiedlora run` recognises the tokens of its ranks
_GIVEN_UP, _CANDIDATE = f"{OWNER_FILE}-given-up-", f"{OWNER_FILE}-new-"  # followed by a start id
STALE_SECONDS = 60.0  # an owner counts as given up if it has not renewed its token for so long
_MISSED_SECONDS = 20.0  # the same, if its lock is free: it has missed two renewals
_BOOT_ID, _PROCESS_NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


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
        processes: id of the namespace that has process `pid`; '' if it is unknown.
        job: START_ID of that process.
    """

    start: Text
    host: Text
    pid: Count
    machine: Text
    since: Annotated[float, Field(strict=True, ge=0, le=1e11)]
    processes: Text = ""
    job: Text = ""

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
        if not self._has_written(OWNER_FILE):
            token = read_token(self.folder / OWNER_FILE)
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

    def _has_written(self, name: str) -> bool:
        """Whether this token is this start's. It is read before every change, so only the id is checked."""
        for _ in range(3):
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    return bool(json.loads(os.read(descriptor, 4096)).get("start") == self.start)
                finally:
                    os.close(descriptor)
            except (NotADirectoryError, ValueError, AttributeError):
                return False
            except OSError:  # a network file system may fail for a moment, and `give_back` take the file away
                time.sleep(0.5)
        return False

    def give_up(self) -> None:
        """Let the next start with --resume take the folder, even if the lock's holder may wake up. Best effort."""
        with suppress(OSError):
            # a host that does not see the folder has nothing to wait for
            if self.folder.is_dir() and self._has_written(OWNER_FILE):
                self._mark.touch()

    def give_back(self) -> None:
        """Remove this start's files, unless a child holds the lock."""
        file, away = self.folder / OWNER_FILE, self.folder / f"{_CANDIDATE}{self.start}"
        if not self._has_written(file.name) or _is_unlocked(file) is False:
            return
        os.rename(file, away)
        if not self._has_written(away.name):  # it was suspended since it looked, and another start took the folder
            os.rename(away, file)
        away.unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)

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

    def __enter__(self) -> "FolderLock":
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
        with suppress(OSError), _one_at_a_time(self.owner.folder, self.lock_seconds):
            self.owner.give_back()
        _remove_empty(self._made)


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
    ids, job = (uuid.uuid4().hex[:16], socket.gethostname(), os.getpid(), _machine()), os.environ.get(START_ID, "")
    token = Token(*ids, time.time(), _processes(), job)
    temporary, descriptor = folder / f"{_CANDIDATE}{token.start}", None
    made: tuple[Path, ...] = ()
    try:
        while descriptor is None:
            made = _make(folder, new=new)
            with suppress(FileNotFoundError):  # a start that gave it back has removed it since
                descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o664)
        with suppress(OSError):  # a file system without locks: then only the token's mtime counts
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, json.dumps(asdict(token)).encode())  # a token without a lock is of a dead start
        with _one_at_a_time(folder, lock_seconds):
            _put_token(temporary, resumes=resumes, take_over=take_over, hint=hint, before=before)
        emptied = (folder, *made[1:]) if removed_after else made
        return FolderLock(Owner(folder, token.start), descriptor, renew_seconds, lock_seconds, emptied)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if descriptor is not None:
            os.close(descriptor)
        _remove_empty((folder, *made[1:]) if removed_after else made)
        if isinstance(error, OSError) and not (new and isinstance(error, FileExistsError)):
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
        raise


def _make(folder: Path, *, new: bool) -> tuple[Path, ...]:
    """Create the folder and its parents. Returns those that were created, the innermost first."""
    made: list[Path] = []
    for path in (*reversed(folder.parents), folder):
        is_new = new and path == folder
        if is_new or not path.is_dir():
            try:
                path.mkdir()
                made.insert(0, path)
            except FileExistsError:
                if is_new or path.is_symlink():  # to nothing
                    raise
    return tuple(made)


def _put_token(temporary: Path, *, resumes: bool, take_over: bool, hint: str, before: Callable[[], None]) -> None:
    """Rename `temporary`, which holds a token, to OWNER_FILE if the folder may be taken."""
    folder, now = temporary.parent, temporary.stat().st_mtime
    owned = folder / OWNER_FILE
    try:
        os.link(temporary, owned)  # fails if there is a token, even one that another host has just written
    except OSError:  # a token exists, or the file system has no hard links
        if not take_over:
            _reject_owned(folder, now=now, resumes=resumes, hint=hint)
        before()
        os.replace(temporary, owned)
    else:
        temporary.unlink()
    for mark in (*folder.glob(f"{_GIVEN_UP}*"), *folder.glob(f"{_CANDIDATE}*")):
        with suppress(OSError):  # a candidate is left by a start that was killed while it took the folder
            age = now - mark.stat().st_mtime
            if mark.name.startswith(_GIVEN_UP) or age > STALE_SECONDS or _is_dead(mark, age):
                mark.unlink()


def _reject_owned(folder: Path, *, now: float, resumes: bool, hint: str) -> None:
    """Raise FolderTaken unless the folder's owner is dead or was given up.

    Args:
        now: mtime of a file that was just written there, since the clocks of hosts differ.
    """
    file = folder / OWNER_FILE
    token = read_token(file)
    try:
        age = now - file.stat().st_mtime
    except OSError:  # released meanwhile
        return
    silent = age > STALE_SECONDS or (token is not None and (folder / f"{_GIVEN_UP}{token.start}").exists())
    if _is_dead(file, age) or (silent and (resumes or _is_unlocked(file) is not False)):
        return
    who = "another start" if token is None else f"{token} since {token.time}"
    raise FolderTaken(f"{folder}: {who} is at work here (last seen {max(0.0, age):.0f} s ago); {hint}")


def _is_dead(file: Path, age: float = 0.0) -> bool:
    """Whether the process that wrote the token `file` ran on this machine and died.

    Machines that were cloned have one id, and containers of one may not see each other's locks. So a free lock is not
    enough: the process is gone too, or it has not renewed its token for `age` seconds.
    """
    token = read_token(file)
    if token is None or token.machine != _machine() or _is_unlocked(file) is not True:
        return False
    return age > _MISSED_SECONDS or (token.processes == _processes() and _is_gone(token.pid))


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # psutil takes a process that it may not see for gone
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess, OverflowError):
        return True
    except PermissionError:
        return False


def owner_in_words(folder: Path) -> str | None:
    """The owner of the folder and since when, in words. None if nobody does, or if its owner is known to be dead."""
    file = folder / OWNER_FILE
    token = read_token(file)
    return None if token is None or _is_dead(file) else f"{token} since {token.time}"


def read_token(file: Path) -> Token | None:
    """The token in an OWNER_FILE, or None if there is no readable one."""
    try:
        return read_fields(file, read_json_object(file, kind="an owner's token"), Token, optional=["processes", "job"])
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
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@cache
def _machine() -> str:
    """An id of the running kernel, whose locks all its processes share; containers differ in host name."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


@cache
def _processes() -> str:
    """An id of the namespace of this process's id: in another one the same number is another process."""
    try:
        return os.readlink(_PROCESS_NAMESPACE)
    except OSError:
        return socket.gethostname()
