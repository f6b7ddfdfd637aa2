"""The saved weights of a service: their rows in the database, and the folders that nothing needs any more."""

import json
import re
import secrets
from contextlib import suppress
from pathlib import Path
from sqlite3 import Row

from megatron_tiedlora.base.files import Guard, discard, remove_leftovers
from megatron_tiedlora.base.messages import bytes_in_words, nearest_name, shown
from megatron_tiedlora.parallel.agreement import unpacked
from megatron_tiedlora.service.database import Database
from megatron_tiedlora.service.operations import Create, Failure
from megatron_tiedlora.service.records import Limits, Refused, SamplerInfo, SavedWeights, known

_NEEDED = """
SELECT samplers.folder FROM samplers JOIN sessions ON sessions.key = session WHERE ended IS NULL
UNION SELECT folder FROM operations WHERE result_kind = ''
UNION SELECT operations.folder FROM operations JOIN models ON model = queue WHERE number > saved
"""  # folders of weights that can be sampled from, or that an operation or its replay needs
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # no dot at the start: temporary files have one
_LAST_USED = "COALESCE((SELECT used FROM samplers WHERE samplers.key = sampler), created)"


class WeightFolders:
    """The saved weights below the folder of a service."""

    def __init__(self, database: Database, folder: Path, guard: Guard) -> None:
        self._database, self._folder, self._guard = database, folder, guard
        known = {model_folder(model) for model in database.column("SELECT model FROM models")}
        for path in folder.glob("models/*"):
            if str(path.relative_to(folder)) not in known:  # it was being forgotten
                self._remove(path)
        self._past = set[str]()  # folders of forgotten weights, which may be in memory, so no others get their names
        # Folders to remove when nothing needs them: at the start what a crash may have left.
        self._unwanted = {str(path.relative_to(folder)) for path in folder.glob("models/*/*weights/*")}

    def where(self, condition: str, *values: object) -> list[SavedWeights]:
        """Return the weights for which a condition in SQL holds."""
        find = f'SELECT "create", key, folder, size, created, sampler FROM weights WHERE {condition}'
        rows = self._database.run(find, *values).fetchall()
        return [SavedWeights(unpacked(Create, create, sender=0), *own) for create, *own in rows]

    def at(self, path: str, owner: str, *, optimizer: bool = False) -> SavedWeights:
        """Return the weights at a tinker:// path. Raise Refused if the owner has none, or none with an optimizer."""
        found = self.where("key = ? AND owner = ?", path, owner)
        if not found:
            near = nearest_name(path, self._database.column("SELECT key FROM weights WHERE owner = ?", owner))
            raise Refused(404, f"the weights {shown(path)} are unknown{near}")
        if optimizer and path.split("/")[-2] != "weights":
            raise Refused(400, f"{path} has no optimizer; load it without one, or give a path of /weights/")
        return found[0]

    def new(self, model: str, kind: str, name: str | None, *, overwrite: bool) -> tuple[str, str]:
        """Return the tinker:// path and the folder of weights that a model will save. `name` None makes temporary ones.
        Raise Refused if the name cannot be a file's name, or if it exists."""
        if name is not None and not _NAME.fullmatch(name):
            use = "use 1 to 64 of A-Z a-z 0-9 . _ - and no dot first"
            raise Refused(400, f"the name {shown(name)} is rejected; {use}")
        chosen = f"temporary-{secrets.token_hex(8)}" if name is None else name
        path, folder = f"tinker://{model}/{kind}/{chosen}", f"{model_folder(model)}/{kind}/{chosen}"
        waiting = "SELECT extra FROM operations WHERE queue = ? AND kind = 'Save' AND result_kind = ''"
        exists = any(json.loads(extra).get("path") == path for extra in self._database.column(waiting, model))
        exists |= bool(self.where("key = ?", path))
        if exists and not overwrite:
            raise Refused(409, f"{path} exists; choose another name, or overwrite it")
        if exists or folder in self._past or (self._folder / folder).exists():
            folder += f"~{secrets.token_hex(4)}"  # what has the old weights goes on with them, also in a replay
        return path, folder

    def open_sampler(self, owner: str, session: str, number: int, path: str | None) -> str:
        """Return the id of the sampler `number` of a session. If it is new, it has the weights at `path`, or none."""
        find = "SELECT key FROM samplers WHERE session = ? AND number = ?"
        if (row := self._database.row(find, session, number)) is not None:
            return str(row["key"])
        folder = "" if path is None else self.at(path, owner).folder
        key, fields = secrets.token_hex(16), {"path": path or "", "folder": folder}
        self._database.put("samplers", key=key, owner=owner, session=session, number=number, **fields)
        return key

    def sampler(self, owner: str, sampler: str) -> SamplerInfo:
        """Return what is known of a sampler. Raise Refused if it is unknown."""
        find = "SELECT session, path, folder FROM samplers WHERE key = ? AND owner = ?"
        return SamplerInfo(*known(self._database.row(find, sampler, owner), "sampler", sampler))

    def keep(self, future: Row, model: Row, now: float) -> None:
        """Add the weights that a `Save` has written, and their sampler if they are temporary."""
        extra, folder = json.loads(future["extra"]), future["folder"]
        path, sampler, ttl = extra["path"], extra.get("sampling_session_id", ""), extra["ttl_seconds"]
        for replaced in self.where("key = ?", path):
            self._drop(replaced)
        size = sum(file.stat().st_size for file in (self._folder / folder).rglob("*") if file.is_file())
        common = {"owner": model["owner"], "folder": folder}
        about = {"model": model["model"], "create": model["create"], "created": now}
        expires = None if ttl is None else now + ttl
        self._database.put("weights", key=path, size=size, expires=expires, sampler=sampler, **common, **about)
        if sampler:
            number, session = extra["session_number"], model["session"]
            self._database.put("samplers", key=sampler, session=session, number=number, path=path, **common)

    def forget(self, weights: SavedWeights) -> None:
        """Remove weights and the sampler that they were saved for."""
        self._drop(weights)
        self._database.run("DELETE FROM samplers WHERE key = ?", weights.sampler)
        self._database.run("DELETE FROM weights WHERE key = ?", weights.key)

    def _drop(self, weights: SavedWeights) -> None:
        self._unwanted.add(weights.folder)
        if not weights.sampler:  # temporary weights have a name that does not come again
            self._past.add(weights.folder)

    def forget_expired(self, now: float, ended: float) -> None:
        """Forget weights whose time is over, and temporary ones of sessions that ended before `ended`."""
        old = "SELECT samplers.key FROM samplers JOIN sessions ON sessions.key = session WHERE ended <= ?"
        for weights in self.where(f"expires <= ? OR sampler IN ({old})", now, ended):
            self.forget(weights)

    def make_room(self, owner: str, limits: Limits, now: float) -> None:
        """Raise Refused if all that is stored of an owner reaches the limit. Temporary weights that rest go first."""
        total = self._database.stored(owner)
        if total < limits.disk_bytes:
            return
        resting = f"owner = ? AND sampler != '' AND {_LAST_USED} <= ? ORDER BY {_LAST_USED}"
        for weights in self.where(resting, owner, now - limits.answer_seconds):
            if total >= limits.disk_bytes:
                self.forget(weights)
                total -= weights.size
        if total >= limits.disk_bytes:
            said = f"{bytes_in_words(total)} of requests, answers and saved weights"
            limit = bytes_in_words(limits.disk_bytes)
            raise Refused(400, f"{said} reach the limit of {limit}; fetch answers, or delete weights")

    def room_failure(self, owner: str, limits: Limits, now: float) -> Failure | None:
        """Make room in a transaction. Return None, or a failure if there is none."""
        try:
            with self._database.transaction():
                self.make_room(owner, limits, now)
        except Refused as error:
            return Failure(str(error), by_user=True)
        return None

    def remove_unwanted(self) -> None:
        """Remove the folders of forgotten weights that no operation or sampler still needs."""
        if self._unwanted:  # perhaps also known weights, if a transaction has failed
            self._unwanted.difference_update(self._database.column("SELECT folder FROM weights"))
            needed = set(self._database.column(_NEEDED))
            for folder in self._unwanted - needed:
                discard(self._folder / folder, guard=self._guard)
            self._unwanted &= needed

    def remove_model(self, model: str) -> None:
        """Remove all but the weights from a model's folder."""
        self._remove(self._folder / model_folder(model))

    def _remove(self, folder: Path) -> None:
        remove_leftovers(folder, guard=self._guard)
        discard(folder / "state", guard=self._guard)
        for empty in (*folder.glob("*weights"), folder):
            with suppress(OSError):
                empty.rmdir()


def model_folder(model: str) -> str:
    """Return the folder of a model, relative to the folder of the service."""
    return f"models/{model.replace(':', '-')}"
