"""Let only one launch of a command write to a folder at a time. This launch is the owner of the folder.

OWNER_FILE contains a token (launch id, host, process, time). The owner keeps the file locked, and the kernel frees the
lock when the owner dies. The owner also renews the file's mtime, which other hosts see. A launch that takes over a
folder replaces the file without waiting. The previous owner sees the new token before it next changes the folder.

The owner checks the token right before each rename of a temporary file (`files`). A new owner removes temporary files
before it reads the folder. So an owner that is suspended between check and rename changes nothing when it resumes.
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
from typing import Annotated, TypeVar

import psutil
from pydantic import Field

from megatron_tiedlora.base.files import TEMPORARY_PREFIX, Count, Text, read_fields, read_json_object
from megatron_tiedlora.base.messages import UserError

OWNER_FILE = ".owner"
START_ID = "MEGATRON_TIEDLORA_START"  # `tiedlora run` recognises the tokens of its ranks by this variable's value
_GIVEN_UP, _CANDIDATE = f"{OWNER_FILE}-given-up-", f"{OWNER_FILE}-new-"  # prefixes of file names, before a launch id
STALE_SECONDS = 60.0  # after this time without a renewal of its token, an owner has lost its claim to the folder
_RENEW_SECONDS = 10.0  # time between two renewals of the token
_LOCK_SECONDS = 5.0  # longest wait for the lock on the folder itself, which processes hold only briefly
_MISSED_SECONDS = 20.0  # an owner whose lock is free is dead after this time without a renewal
_BOOT_ID, _PROCESS_NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")

Lock = TypeVar("Lock")


class FolderTaken(UserError):
    """The error that is raised if another launch owns the folder."""


class OwnerLost(UserError):
    """The error that is raised if this launch no longer owns the folder."""


@dataclass(frozen=True)
class Token:
    """The content of OWNER_FILE, which identifies the owner of the folder.

    Attributes:
        start: unique id of the launch.
        machine: id of the running kernel, which shows whether the owner's lock can be tested here.
        since: time when the owner took the folder, in seconds since 1970 by the owner's clock.
        processes: id of the PID namespace of process `pid`; '' if it is unknown.
        job: value of the variable START_ID in process `pid`.
    """

    start: Text
    host: Text
    pid: Count
    machine: Text
    since: Annotated[float, Field(strict=True, ge=0, le=1e11)]
    processes: Text = ""
    job: Text = ""

    def __str__(self) -> str:
        return f"a launch on {self.host} (process {self.pid})"

    @property
    def time(self) -> str:
        """Return `since` as text in local time, such as 2025-01-31 12:00:00."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))


@dataclass(frozen=True)
class Owner:
    """A launch that owns a folder. Each rank of the launch has an instance.

    Attributes:
        is_main: whether this rank holds the lock. The other ranks can only give up the folder.
    """

    folder: Path
    start: str
    is_main: bool = True

    def check(self) -> None:
        """Raise OwnerLost if this launch may no longer change the folder."""
        if not self._has_written(OWNER_FILE):
            token = read_token(self.folder / OWNER_FILE)
            if token is not None:
                why = f"{token} took it over at {token.time} and may continue it"
            elif self.folder.is_dir():
                why = f"its file {OWNER_FILE} is missing"
            else:
                why = "the folder was removed, moved or replaced"
            made = "so this launch made no further changes there"
            raise OwnerLost(f"{self.folder}: {why}, {made}; start again only in another folder")
        if self.is_main and self._mark.exists():
            raise OwnerLost(
                f"{self.folder}: the other ranks no longer received this rank's heartbeat, so this launch made no"
                " further changes there; start it again"
            )

    def _has_written(self, name: str) -> bool:
        """Return whether the token in file `name` is this launch's own. Only the id is compared, to save time."""
        for _ in range(3):
            try:
                descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    return bool(json.loads(os.read(descriptor, 4096)).get("start") == self.start)
                finally:
                    os.close(descriptor)
            except (NotADirectoryError, ValueError, AttributeError):
                return False
            except OSError:  # a network file system may fail for a moment, or `give_back` may remove the file
                time.sleep(0.5)
        return False

    def give_up(self) -> None:
        """Let the next launch with --resume take the folder, even if its owner is suspended. Errors are ignored."""
        with suppress(OSError):
            # `_has_written` would wait on a host that does not see the folder
            if self.folder.is_dir() and self._has_written(OWNER_FILE):
                self._mark.touch()

    def give_back(self) -> None:
        """Remove the owner files of this launch, unless a child process still holds the lock."""
        file, away = self.folder / OWNER_FILE, self.folder / f"{_CANDIDATE}{self.start}"
        if not self._has_written(file.name) or _is_unlocked(file) is False:
            return
        os.rename(file, away)
        if not self._has_written(away.name):  # this process was suspended, and another launch took the folder
            os.rename(away, file)
        away.unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)

    @property
    def _mark(self) -> Path:
        return self.folder / f"{_GIVEN_UP}{self.start}"


@dataclass
class FolderLock:
    """A folder that this process owns until it calls `release`.

    Attributes:
        descriptor: descriptor of the locked file. Child processes that inherit it keep the lock until they end.
    """

    owner: Owner
    descriptor: int
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
        while not self._over.wait(_RENEW_SECONDS):
            with suppress(OSError):
                os.utime(self.descriptor)

    def release(self) -> None:
        """Release the folder, unless a child process holds the lock. Remove empty folders that were created with it."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join(_LOCK_SECONDS)
        os.close(self.descriptor)
        with suppress(OSError), _one_at_a_time(self.owner.folder):
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
) -> FolderLock:
    """Make this process the owner of a folder. The folder is created if it does not exist.

    A folder is free if it has no owner, or if its owner died on this machine. A folder can also be taken if other ranks
    gave it up, or if its token was not renewed for STALE_SECONDS. If the owner still holds the kernel's lock, only a
    launch that resumes may take such a folder.

    Args:
        hint: what the user can do if the folder has an owner, for the error message.
        new: whether the folder must not exist yet.
        resumes: whether this launch continues a run.
        take_over: whether to take the folder from any owner.
        before: called before the folder is taken from an earlier launch. If it raises, that launch keeps the folder.
        removed_after: whether `release` removes the folder if it is empty, even if another process created it.

    Raises:
        FolderTaken: another launch owns the folder. The message names its host, process and start time.
        FileExistsError: the folder exists, and `new` is true.
        UserError: the folder cannot be created or written.
    """
    ids, job = (uuid.uuid4().hex[:16], socket.gethostname(), os.getpid(), _machine()), os.environ.get(START_ID, "")
    token = Token(*ids, time.time(), _processes(), job)
    temporary, descriptor = folder / f"{_CANDIDATE}{token.start}", None
    made: tuple[Path, ...] = ()
    try:
        while descriptor is None:
            made = _make(folder, new=new)
            with suppress(FileNotFoundError):  # its previous owner has just removed the folder
                descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o664)
        with suppress(OSError):  # on a file system without locks, only the token's mtime counts
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, json.dumps(asdict(token)).encode())  # after locking: an unlocked token means a dead launch
        with _one_at_a_time(folder):
            _put_token(temporary, resumes=resumes, take_over=take_over, hint=hint, before=before)
        emptied = (folder, *made[1:]) if removed_after else made
        return FolderLock(Owner(folder, token.start), descriptor, emptied)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if descriptor is not None:
            os.close(descriptor)
        _remove_empty((folder, *made[1:]) if removed_after else made)
        if isinstance(error, OSError) and not (new and isinstance(error, FileExistsError)):
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}); give another folder") from error
        raise


def retried(take: Callable[[], Lock], *, seconds: float, pause: float) -> Lock:
    """Return the result of `take`, which is called again after a pause, for some seconds, if it raises FolderTaken."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(FolderTaken):
            return take()
        time.sleep(pause)
    return take()


def _make(folder: Path, *, new: bool) -> tuple[Path, ...]:
    """Create the folder and its parents. Return the folders that were created, innermost first."""
    made: list[Path] = []
    for path in (*reversed(folder.parents), folder):
        is_new = new and path == folder
        if is_new or not path.is_dir():
            try:
                path.mkdir()
                made.insert(0, path)
            except FileExistsError:
                if is_new or path.is_symlink():  # a link without a target
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
            reject_owner(folder, now=now, resumes=resumes, hint=hint)
        before()
        os.replace(temporary, owned)
    else:
        temporary.unlink()
    for mark in (*folder.glob(f"{_GIVEN_UP}*"), *folder.glob(f"{_CANDIDATE}*")):
        with suppress(OSError):  # a launch that was killed while it took the folder leaves a candidate
            age = now - mark.stat().st_mtime
            if mark.name.startswith(_GIVEN_UP) or age > STALE_SECONDS or _is_dead(mark, age):
                mark.unlink()


def reject_owner(folder: Path, *, now: float, hint: str, resumes: bool = False) -> None:
    """Raise FolderTaken if the folder has a living owner that has not lost its claim to the folder. If two launches
    first take one folder each and then check the other's, at most one of them continues.

    Args:
        now: mtime of a file that was just written in its file system, because the clocks of hosts differ.
    """
    file = folder / OWNER_FILE
    token = read_token(file)
    try:
        age = now - file.stat().st_mtime
    except OSError:  # the owner has just released the folder
        return
    silent = age > STALE_SECONDS or (token is not None and (folder / f"{_GIVEN_UP}{token.start}").exists())
    if _is_dead(file, age) or (silent and (resumes or _is_unlocked(file) is not False)):
        return
    who = "another launch" if token is None else f"{token} since {token.time}"
    raise FolderTaken(f"{folder}: {who} is using this folder (last seen {max(0.0, age):.0f} s ago); {hint}")


def _is_dead(file: Path, age: float = 0.0) -> bool:
    """Return whether the process that wrote the token `file` ran on this machine and died.

    Cloned machines have the same id, and containers on one machine may not see each other's locks. So a free lock is
    not enough. The process must also have ended, or its token must be older than a limit. `age` is the token's age in
    seconds.
    """
    token = read_token(file)
    if token is None or token.machine != _machine() or _is_unlocked(file) is not True:
        return False
    return age > _MISSED_SECONDS or (token.processes == _processes() and _is_gone(token.pid))


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # psutil treats a process that it may not see as gone
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess, OverflowError):
        return True
    except PermissionError:
        return False


def owner_in_words(folder: Path) -> str | None:
    """Return text with the folder's owner and the time when it took the folder, or None without a living owner."""
    file = folder / OWNER_FILE
    token = read_token(file)
    return None if token is None or _is_dead(file) else f"{token} since {token.time}"


def read_token(file: Path) -> Token | None:
    """Return the token in an OWNER_FILE, or None if the file cannot be read."""
    try:
        return read_fields(file, read_json_object(file, kind="an owner's token"), Token, optional=["processes", "job"])
    except (UserError, OSError):
        return None


def is_of_owner(name: str) -> bool:
    """Return whether a file with this name is temporary or records the owner of the folder."""
    return name.startswith((OWNER_FILE, TEMPORARY_PREFIX))


def _is_unlocked(file: Path) -> bool | None:
    """Return whether no process holds the kernel's lock on the file, or None if this is unknown."""
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
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let only one process of this machine at a time run the block, if the file system can lock folders."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS  # after it, go on without the lock: tokens alone are safe too
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
    """Remove the folders in order, and stop at the first folder that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@cache
def _machine() -> str:
    """Return an id of the running kernel. Processes with the same id see the same locks, even in containers."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


@cache
def _processes() -> str:
    """Return an id of this process's PID namespace. A PID identifies a process only within its namespace."""
    try:
        return os.readlink(_PROCESS_NAMESPACE)
    except OSError:
        return socket.gethostname()
