"""The operations of one model in their order, and how they come back after a crash.

A model's state on disk is a saved state of the engine and the operations behind it. After a restart those that changed
weights are handed out again, whether they had been answered or not. Only successes are repeated: a failed operation
changed nothing. A window is the backward passes since the last step, or load that succeeded. If one of them failed, the
next step fails too, and the gradients of all are dropped.
"""

import json
from dataclasses import replace
from pathlib import Path
from sqlite3 import Row

from megatron_tiedlora.parallel.agreement import unpacked
from megatron_tiedlora.service.database import ENDS_WINDOW, Database
from megatron_tiedlora.service.operations import Create, Failure
from megatron_tiedlora.service.records import ModelInfo

_CHANGES = "(backward OR kind IN ('Create', 'Load', 'Step')) AND result_kind != 'Failure'"  # a replay needs these
_BEFORE = "FROM operations WHERE queue = ?1 AND number < ?2"
_WINDOW = f"""SELECT * {_BEFORE} AND backward AND number > COALESCE(
    (SELECT number {_BEFORE} AND {ENDS_WINDOW} ORDER BY number DESC LIMIT 1), 0) ORDER BY number DESC"""
_MOST_CRASHES = 3


def crash_failure(future: Row) -> Failure | None:
    """Return why an operation is not handed out again: the engine has ended several times while it ran it."""
    said = f"the server ended {_MOST_CRASHES} times with an error while it ran this operation"
    return Failure(said, by_user=False) if future["crashes"] >= _MOST_CRASHES else None


class ModelQueue:
    """The operations of a model.

    Attributes:
        known: the row of the model, as it was when the model was created or the service started.
        saved: the number of the last operation in the saved state, or -1 if there is none.
        folder: the folder of that state, relative to the folder of the service.
        turn: the number of the next operation to hand out.
        folded: the number up to which all operations are answered.
        broken: why the model cannot go on, or None.
    """

    def __init__(self, database: Database, model: str) -> None:
        (known,) = database.run("SELECT * FROM models WHERE model = ?", model)
        self._database, self.known, self.create = database, known, unpacked(Create, known["create"], sender=0)
        self.saved, self.folder = known["saved"], known["folder"]
        self.folded, self.turn = self.saved, self.saved + 1
        self.broken: Failure | None = None
        self.fold()

    @property
    def info(self) -> ModelInfo:
        """Return what a client may know."""
        state, row = "failed" if self.broken else "waiting" if self.folded < 0 else "active", self.known
        return ModelInfo(self.create, json.loads(row["info"]), state, row["created"])

    def origin(self, folder: Path) -> Create | str:
        """Return the folder of the saved state, or how the model is created. `folder` is that of the service."""
        if self.folder:
            return str(folder / self.folder)
        return replace(self.create, folder=str(folder / self.create.folder)) if self.create.folder else self.create

    def at(self, number: int) -> Row | None:
        """Return operation `number`, or None if it has not come or was forgotten."""
        find = f"SELECT *, {_CHANGES} AS changes FROM operations WHERE queue = ? AND number = ?"
        return self._database.row(find, self.known["model"], number)

    def failed(self, number: int) -> bool:
        """Return whether an operation has failed. A load that failed leaves gradients, which a state does not have."""
        return (future := self.at(number)) is not None and bool(future["result_kind"] == "Failure")

    @property
    def busy(self) -> bool:
        """Return whether an operation without an answer can run."""
        return self.at(self.folded + 1) is not None

    def fills_gap(self, number: int) -> bool:
        """Return whether later operations wait for operation `number` alone."""
        count = "SELECT COUNT(*) FROM operations WHERE queue = ? AND number BETWEEN ? AND ?"
        before = self._database.value(count, self.known["model"], self.turn, number - 1)
        return bool(before == number - self.turn and self._database.value(count, self.known["model"], number, 2**62))

    def fold(self) -> None:
        """Advance `folded`."""
        while (future := self.at(self.folded + 1)) is not None and future["result_kind"]:
            self.folded += 1
            if future["kind"] == "Create" and future["result_kind"] == "Failure":
                failure = self._database.result(future)
                self.broken = replace(failure, message=f"the model was not created: {failure.message}")

    def next(self) -> tuple[Row, bool] | None:
        """Return the operation whose turn has come, and whether earlier gradients are dropped first (`Ticket.fresh`).

        A step waits for the answers of all earlier operations, as the window decides whether it is taken. So does a
        save, as the limit of the disk counts those before it. Everything waits for the model's creation.
        """
        while (future := self.at(self.turn)) is not None:
            needed = self.turn - 1 if future["kind"] in ("Step", "Save") else min(0, self.turn - 1)
            if not future["result_kind"] and self.folded < needed:
                return None
            self.turn += 1
            if not future["result_kind"] or future["changes"]:
                before = self._database.row(_WINDOW, self.known["model"], future["number"])
                return future, bool(future["backward"]) and before is None
        return None

    def refusal(self, future: Row) -> Failure | None:
        """Return why an operation whose turn has come is not handed out, or None. It depends on the database alone."""
        if future["result_kind"]:
            return None
        if self.broken is not None:
            return self.broken
        if (rejected := json.loads(future["extra"]).get("rejected")) is not None:
            return Failure(rejected, by_user=True)
        if future["kind"] != "Step":
            return None
        passes = self._database.run(_WINDOW, self.known["model"], future["number"]).fetchall()
        why = "" if passes else "the model has no gradients, because no backward pass came since the last step"
        for failed in (one for one in passes if one["result_kind"] == "Failure"):
            why = why or f"operation {failed['number']} failed: {self._database.result(failed).message}"
        said = f"the optimizer step {future['number']} was not taken: {why}"
        return Failure(said, by_user=True) if why else None

    def rewind(self) -> bool:
        """Hand out the operations behind the saved state again, because the model has left the memory. Return whether
        one of them has no answer yet."""
        self.turn = self.saved + 1
        return self.busy

    def give_up(self, number: int, message: str) -> None:
        """Fail all operations without an answer, because operation `number` failed when it was repeated: the engine
        would run them on wrong weights."""
        why = f"operation {number} could not be repeated to bring the model back ({message})"
        self.broken = self.broken or Failure(f"{why}; the server must be started again", by_user=False)

    def save(self, number: int, folder: str) -> None:
        """Record that the state after operation `number` is in `folder`. All answers up to it are then on the disk."""
        assert self.saved <= number <= self.folded, f"{self.saved} <= {number} <= {self.folded}"
        with self._database.transaction():
            update = "UPDATE models SET saved = ?, folder = ? WHERE model = ?"
            self._database.run(update, number, folder, self.known["model"])
        self.saved, self.folder = number, folder

    def absorb(self) -> None:
        """Count answered operations right behind the saved state as part of it if they changed no weights, so that
        they can be forgotten."""
        if self.folder and self.saved < self.folded:
            first = f"SELECT MIN(number) FROM operations WHERE queue = ? AND number > ? AND {_CHANGES}"
            found = self._database.value(first, self.known["model"], self.saved)
            last = self.folded if found is None else min(self.folded, found - 1)
            if last > self.saved:
                self.save(last, self.folder)
                self.turn = max(self.turn, last + 1)
