"""The keys of a training service's clients. A file lists the owner and the SHA-256 of each key, and never the key."""

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import threading
from contextlib import suppress
from pathlib import Path

from megatron_tiedlora.base.messages import UserError, os_errors, shown

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}) +([0-9a-f]{64})")
_PREFIX = "tml-"  # clients accept no other key
_LARGEST = 2**20  # bytes of a token file

logger = logging.getLogger(__name__)


class TokenFile:
    """The keys in a token file. A change of the file takes effect with the next request."""

    def __init__(self, file: Path) -> None:
        """Read the file.

        Raises:
            UserError: it is missing, has no keys, is not valid, or other users can read it.
        """
        self._file, self._lock = file, threading.Lock()
        self._seen, self._owners = _stamp(file), _read(file)
        if not self._owners:
            raise UserError(f"{file}: has no tokens. Add one with --new_token OWNER")

    def owner_of(self, key: str) -> str | None:
        """Return the owner of a key, or None if it is unknown. The time does not depend on where keys differ."""
        with self._lock:
            if (stamp := _stamp(self._file)) != self._seen:
                self._seen = stamp
                try:
                    self._owners = _read(self._file)
                except UserError as error:  # a slip of an editor ends nobody's run
                    logger.warning("%s (the tokens that were read before stay valid)", error)
            owners = self._owners
        digest = _digest(key)
        return max((name for known, name in owners.items() if hmac.compare_digest(known, digest)), default=None)


def new_token(file: Path, owner: str) -> str:
    """Add a new key for `owner` to a token file, which is made if it is missing. Return the key, which nothing stores.

    Raises:
        UserError: the owner's name or the file is not valid, or the file cannot be written.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{owner} {_digest(key)}"
    if _LINE.fullmatch(line) is None:
        raise UserError(f"--new_token {shown(owner)}: is not a name; use 1 to 64 letters, digits, dots, dashes or _")
    if file.exists():
        _read(file)
    with os_errors(f"{file}: cannot be written", fix="; check the folder and its permissions"):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(f"{line}\n".encode())
            stream.flush()
            os.fsync(stream.fileno())
    return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def _stamp(file: Path) -> tuple[int, ...]:
    """Return what changes when the file changes; nothing if it is missing."""
    with suppress(OSError):
        found = file.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode
    return ()


def _read(file: Path) -> dict[str, str]:
    """Return the owner of each digest. Raise UserError if the file is missing, not valid, or not private."""
    fix = ". Make a token file with --new_token OWNER"
    with os_errors(f"{file}: cannot be read", fix=fix), file.open("rb") as stream:
        found = os.fstat(stream.fileno())
        raw = stream.read(_LARGEST)
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{file}: is not a file of this user, so its tokens are not trusted; give another file")
    if found.st_mode & 0o077:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise UserError(f"{file}: other users can read or change it (mode {mode}). Run: chmod 600 {file}")
    owners = {}
    for number, line in enumerate(raw.decode(errors="replace").splitlines(), 1):
        if text := line.partition("#")[0].strip():
            if (parts := _LINE.fullmatch(text)) is None:
                raise UserError(f"{file}: line {number} is not OWNER SHA256; remove it")
            owners[parts[2]] = parts[1]
    return owners
