"""The desk after a crash: names, answers and weights are those of a service that never ended."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.desk_crash import Mark, crashed, watched
from support.desk_engine import BAD_RATE, BAD_TOKEN, CREATE, SAMPLE, Clock, HashEngine, one_pass, step

from megatron_tiedlora.service.database import Database
from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.operations import Failure, Load, Operation, PassResult, Step
from megatron_tiedlora.service.records import Answered, Limits, Refused


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> dict[Database, Mark]:
    return watched(monkeypatch)


@dataclass
class Restarts:
    """A desk that can be restarted in a new folder each time."""

    tmp_path: Path
    synced: dict[Database, Mark]
    clock: Clock = field(default_factory=Clock)
    count: int = 0

    def __post_init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self.desk = Desk.open(self.tmp_path / str(self.count), Limits(), clock=self.clock)
        self.engine = HashEngine(self.desk)

    def crash(self, draw: random.Random | None = None) -> None:
        self.count += 1
        crashed(self.desk, self.tmp_path / str(self.count), draw, self.synced)
        self._open()

    def run(self) -> None:
        while self.engine.turn():
            pass

    def result(self, request: str) -> Any:
        self.run()
        answer = self.desk.answer_of("ann", request)
        assert isinstance(answer, Answered)
        return answer.result

    def windows(self, model: str, *operations: Operation, begin: int = 1) -> list[Any]:
        requests = [self.desk.submit("ann", model, number, one) for number, one in enumerate(operations, begin)]
        return [self.result(request) for request in requests]


@pytest.fixture
def service(tmp_path: Path, synced: dict[Database, Mark]) -> Iterator[Restarts]:
    made = Restarts(tmp_path, synced)
    yield made
    made.desk.close()


@pytest.fixture
def model(service: Restarts) -> str:
    session = service.desk.open_session("ann", metadata={"a": "b"})
    service.desk.create("ann", session, 0, CREATE, info={})
    service.run()
    return f"{session}:train:0"


def kept(service: Restarts, model: str) -> list[int]:
    """The numbers of the operations that the desk has."""
    found = "SELECT number FROM operations WHERE queue = ? ORDER BY number"
    return service.desk._database.column(found, model)


def numbers(service: Restarts) -> list[int]:
    return [ticket.number for ticket in service.engine.ran if ticket.model]


def test_everything_keeps_its_name(service: Restarts, model: str) -> None:
    desk, session = service.desk, model.split(":")[0]
    first = desk.submit("ann", model, 1, one_pass(1))
    path = f"tinker://{model}/weights/w"
    save = desk.save("ann", model, 2, "w", kind="weights")
    service.run()
    sampler = desk.open_sampler("ann", session, 3, path=path)
    sample = desk.sample("ann", sampler, 0, SAMPLE)
    later = desk.submit("ann", model, 4, one_pass(3))
    service.crash()
    desk = service.desk
    assert desk.submit("ann", model, 1, one_pass(1)) == first
    assert desk.save("ann", model, 2, "w", kind="weights") == save
    assert desk.open_sampler("ann", session, 3, path=path) == sampler
    assert desk.sample("ann", sampler, 0, SAMPLE) == sample
    assert desk.submit("ann", model, 4, one_pass(3)) == later
    assert [one.key for one in desk.checkpoints("ann")] == [path]
    assert desk.model_of("ann", model).create == CREATE
    assert not isinstance(service.result(sample[0]), Failure)
    desk.submit("ann", model, 3, one_pass(2))
    assert isinstance(service.result(later), PassResult)
    with pytest.raises(Refused):
        desk.model_of("bob", model)


def test_operations_behind_the_saved_state_run_again_and_answers_stay(service: Restarts, model: str) -> None:
    before = service.windows(model, one_pass(1), step())
    fetched = service.desk.submit("ann", model, 1, one_pass(1))
    service.engine.save(model)
    after = service.windows(model, one_pass(2), step(), one_pass(4, backward=False), begin=3)
    path = service.desk.save("ann", model, 6, "w", kind="weights")
    weights = service.engine.weights[model] if service.run() is None else ""
    service.crash()
    assert isinstance(service.desk.origin(model), str)
    service.run()
    assert numbers(service) == [3, 4], "only what changes weights is repeated"
    assert service.engine.weights[model] == weights
    assert service.result(fetched).loss == before[0].loss
    again = [service.result(service.desk.submit("ann", model, number, step())) for number in (3, 4, 5)]
    assert [again[0].loss, again[1], again[2].loss] == [after[0].loss, after[1], after[2].loss]
    assert not isinstance(service.result(path), Failure)


def test_old_operations_go_when_their_answers_are_forgotten(service: Restarts, model: str) -> None:
    requests = []
    for number in range(1, 7, 2):
        requests += [service.desk.submit("ann", model, number, one_pass(1))]
        requests += [service.desk.submit("ann", model, number + 1, step())]
        service.run()
        service.engine.save(model)
    assert kept(service, model) == list(range(7))
    assert [path.name for path in service.desk.state_folder(model, 6).parent.iterdir()] == ["6"]
    create = service.desk._queues[model].at(0)["request"]
    for request in (create, *requests[:4]):
        service.desk.taken("ann", request)
    service.clock.now += 601
    service.desk.ready(0)
    assert kept(service, model) == [5, 6]
    service.crash()
    for request in requests[4:]:
        assert not isinstance(service.result(request), Failure)
    for request in requests[:4]:
        with pytest.raises(Refused):
            service.desk.answer_of("ann", request)
    assert numbers(service) == []


def test_what_changes_no_weights_joins_the_saved_state(service: Restarts, model: str) -> None:
    service.windows(model, one_pass(1))
    service.engine.save(model)
    forward = one_pass(2, backward=False)
    service.windows(model, *[forward] * 5, one_pass(BAD_TOKEN), step(), forward, begin=2)
    service.windows(model, one_pass(3), forward, begin=10)
    for number in range(2, 11):
        service.desk.taken("ann", service.desk.submit("ann", model, number, forward))
    for seconds in (601, 10):
        service.clock.now += seconds
        service.desk.ready(0)
    assert (service.desk._queues[model].saved, kept(service, model)) == (9, [0, 1, 8, 10, 11])
    service.crash()
    service.engine.ran.clear()
    (result,) = service.windows(model, step(), begin=12)
    assert numbers(service) == [10, 12]
    session = model.split(":")[0]
    request = service.desk.create("ann", session, 1, CREATE, info={})
    service.result(request)
    other = f"{session}:train:1"
    requests = [service.desk.submit("ann", other, number, one) for number, one in enumerate((one_pass(3), step()), 1)]
    assert service.result(requests[1]).grad_norm == result.grad_norm


def test_a_fetched_answer_is_kept_over_a_restart(service: Restarts, model: str) -> None:
    request = service.desk.submit("ann", model, 1, one_pass(1))
    first = service.result(request)
    service.desk.taken("ann", request)
    service.engine.save(model)
    service.clock.now += 500
    service.crash()
    assert service.result(request).loss == first.loss
    service.clock.now += 101
    service.desk.ready(0)
    with pytest.raises(Refused):
        service.desk.answer_of("ann", request)


def test_failures_are_not_repeated_and_their_windows_stay_closed(service: Restarts, model: str) -> None:
    bad = one_pass(BAD_TOKEN)
    operations = (one_pass(1), bad, one_pass(2), step(), one_pass(3), step(BAD_RATE), bad, step(), one_pass(4), step())
    found = service.windows(model, *operations)
    service.crash(random.Random(0))
    service.run()
    assert service.engine.weights[model] == f"{int(found[-1].grad_norm):012x}"
    assert [ticket.number for ticket in service.engine.ran if isinstance(ticket.operation, Step)] == [10]


@pytest.mark.parametrize("seed", range(4))
def test_a_failure_stays_after_a_power_failure(service: Restarts, model: str, seed: int) -> None:
    request = service.desk.submit("ann", model, 1, one_pass(1))
    service.desk.answer(service.desk.ready(0)[0].request, Failure("out of memory", by_user=False))
    service.crash(random.Random(seed))
    assert isinstance(service.result(request), Failure)


@pytest.mark.parametrize("seed", range(4))
def test_weights_whose_files_are_gone_stay_unknown_after_a_power_failure(
    service: Restarts, model: str, seed: int
) -> None:
    service.desk.save("ann", model, 1, "w", kind="weights", ttl_seconds=10)
    service.run()
    service.engine.save(model)
    service.clock.now += 20
    service.desk.ready(0)
    service.crash(random.Random(seed))
    with pytest.raises(Refused):
        service.desk.checkpoint_of("ann", f"tinker://{model}/weights/w")


def test_the_window_is_part_of_the_saved_state(service: Restarts, model: str) -> None:
    service.windows(model, one_pass(1))
    service.engine.save(model)
    service.crash()
    (result,) = service.windows(model, step(), begin=2)
    assert not isinstance(result, Failure)
    service.windows(model, one_pass(BAD_TOKEN), begin=3)
    service.engine.save(model)
    service.crash()
    (result,) = service.windows(model, step(), begin=4)
    assert "operation 3 failed: an unlucky token" in result.message


def test_a_state_may_be_older_than_the_last_answer(service: Restarts, model: str) -> None:
    service.windows(model, one_pass(1))
    weights, gradients = service.engine.weights[model], list(service.engine.gradients[model])
    service.windows(model, one_pass(2), step(), begin=2)
    after = service.engine.weights[model]
    service.engine.weights[model], service.engine.gradients[model], service.engine.last[model] = weights, gradients, 1
    service.engine.save(model)
    service.crash()
    service.run()
    assert numbers(service) == [2, 3]
    assert service.engine.weights[model] == after


def test_a_model_that_left_the_memory_may_join_its_saved_state(service: Restarts, model: str) -> None:
    service.windows(model, one_pass(1))
    service.engine.save(model)
    forward = one_pass(2, backward=False)
    service.windows(model, forward, begin=2)
    service.engine.drop(model)
    service.desk.taken("ann", service.desk.submit("ann", model, 2, forward))
    for seconds in (601, 10):
        service.clock.now += seconds
        service.desk.ready(0)
    assert not isinstance(service.windows(model, step(), begin=3)[0], Failure)


def test_a_model_that_cannot_be_rebuilt_says_so(service: Restarts, model: str) -> None:
    service.windows(model, one_pass(1), step())
    service.desk.submit("ann", model, 3, one_pass(2))
    service.crash()
    tickets = service.desk.ready(0)
    assert [ticket.number for ticket in tickets] == [0, 1, 2, 3]
    service.desk.answer(tickets[0].request, service.engine.run(tickets[0]))
    service.desk.answer(tickets[1].request, Failure("out of memory", by_user=False))
    for ticket in tickets[2:]:
        service.desk.answer(ticket.request, service.engine.run(ticket))
    result = service.result(tickets[3].request)
    assert not result.by_user
    assert "operation 1 could not be repeated to bring the model back (out of memory)" in result.message
    service.engine.save(model)
    assert isinstance(service.desk.origin(model), type(CREATE)), "wrong weights were recorded"


def test_weights_of_a_crashed_save_or_deletion_go(service: Restarts, model: str) -> None:
    service.desk.save("ann", model, 1, "w", kind="weights")
    service.run()
    service.desk.save("ann", model, 2, "waits", kind="weights")
    folder = service.desk._folder / service.desk.checkpoint_of("ann", f"tinker://{model}/weights/w").folder
    for name in ("orphan", "waits"):
        (folder.parent / name).mkdir()
    service.crash()
    service.clock.now += 10
    service.desk.ready(0)
    found = (service.desk._folder / folder.relative_to(folder.parents[3])).parent.iterdir()
    assert sorted(path.name for path in found) == ["w", "waits"]


def test_a_full_disk_refuses_with_503_and_changes_nothing(service: Restarts, model: str) -> None:
    database = service.desk._database
    database.run("PRAGMA max_page_count = 1")
    with pytest.raises(Refused, match="disk is full") as caught:
        for number in range(1, 30):
            service.desk.submit("ann", model, number, one_pass(*range(20, 200)))
    assert caught.value.status == 503
    database.run("PRAGMA max_page_count = 100000")
    found = len(kept(service, model))
    assert isinstance(service.result(service.desk.submit("ann", model, found, one_pass(1))), PassResult)
    assert kept(service, model) == list(range(found + 1))


# Loads, and names that come again -------------------------------------------------------------------------------------


def test_a_load_that_fails_leaves_the_gradients_and_one_that_succeeds_does_not(
    service: Restarts, model: str
) -> None:
    """Also for passes that were sent before the load's answer, and after a crash."""
    path = f"tinker://{model}/weights/w"
    service.result(service.desk.save("ann", model, 1, "w", kind="weights"))
    found = list[Any]()
    for begin, target in ((2, "tinker://x/weights/typo"), (6, path)):
        service.desk.submit("ann", model, begin, one_pass(1))
        if target == path:
            service.desk.load("ann", model, begin + 1, target, optimizer=True)
        else:
            service.desk.reject("ann", model, begin + 1, Load, "unknown")
        service.desk.submit("ann", model, begin + 2, one_pass(2))
        service.crash()
        found.append(service.result(service.desk.submit("ann", model, begin + 3, step())))
    session = model.split(":")[0]
    for number, passes in enumerate(([one_pass(1), one_pass(2)], [one_pass(2)]), 1):
        service.result(service.desk.create("ann", session, number, CREATE, info={}))
        *_, stepped = service.windows(f"{session}:train:{number}", *passes, step())
        assert stepped == found[number - 1]


def test_weights_of_another_shape_are_not_loaded(service: Restarts, model: str) -> None:
    session = model.split(":")[0]
    service.result(service.desk.create("ann", session, 1, replace(CREATE, rank=2, seed=5), info={}))
    other = f"{session}:train:1"
    service.result(service.desk.save("ann", other, 1, "w", kind="weights"))
    with pytest.raises(Refused, match="is tl6 of rank 2, and not of this model's shape; create a model from it"):
        service.desk.load("ann", model, 1, f"tinker://{other}/weights/w", optimizer=True)
    create = replace(CREATE, rank=2, folder=f"tinker://{other}/weights/w")
    service.result(service.desk.create("ann", session, 2, create, info={}))
    service.desk.load("ann", f"{session}:train:2", 1, f"tinker://{other}/weights/w", optimizer=True)


def test_a_name_that_comes_again_has_another_folder(service: Restarts, model: str) -> None:
    """An engine may still have the old weights in memory, by their folder."""
    folders = set[str]()
    for number in range(1, 7):
        service.result(service.desk.save("ann", model, number, "w", kind="weights", overwrite=True))
        service.engine.save(model)  # no replay needs the folder any more
        folders.update(found.folder for found in service.desk.checkpoints("ann"))
        if number % 3:
            service.desk.delete_checkpoint("ann", f"tinker://{model}/weights/w")
        service.clock.now += 10
        service.desk.ready(0)
    assert len(folders) == 6


def test_no_state_is_recorded_after_a_load_that_failed(service: Restarts, model: str) -> None:
    """The gradients before it are still there, and a state has none."""
    service.result(service.desk.reject("ann", model, 1, Load, "unknown"))
    folder = service.desk.state_folder(model, 1)
    folder.mkdir(parents=True)
    service.desk.saved(model, 1, str(folder))
    assert service.desk.origin(model) == CREATE
