"""The desk: owners, order, retries, limits, failures, weights and samplers, and what expires."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support import desk_engine
from support.desk_engine import BAD_RATE, BAD_TOKEN, CREATE, SAMPLE, Clock, HashEngine, one_pass, step

from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.operations import Done, Failure, Pass, PassResult, Save, StepResult
from megatron_tiedlora.service.records import Answered, Limits, Refused, Unanswered


@dataclass
class Service:
    """A desk with its engine and clock."""

    folder: Path
    limits: Limits
    clock: Clock

    def __post_init__(self) -> None:
        self.desk = Desk.open(self.folder, self.limits, clock=self.clock)
        self.engine = HashEngine(self.desk)

    def session(self, owner: str = "ann") -> str:
        return self.desk.open_session(owner, metadata={})

    def model(self, owner: str = "ann", session: str = "", number: int = 0, **changes: Any) -> str:
        """A new model, created."""
        session = session or self.session(owner)
        self.desk.create(owner, session, number, replace(CREATE, **changes), info={"k": "v"})
        self.run()
        return f"{session}:train:{number}"

    def run(self) -> None:
        while self.engine.turn():
            pass

    def result(self, request: str, owner: str = "ann") -> Any:
        self.run()
        answer = self.desk.answer_of(owner, request)
        assert isinstance(answer, Answered)
        return answer.result

    def saved(self, model: str, number: int, name: str | None = "w", *, owner: str = "ann", **more: Any) -> Any:
        """What the client is told about saved weights."""
        more.setdefault("kind", "weights" if name else "sampler_weights")
        request = self.desk.save(owner, model, number, name, **more)
        assert not isinstance(self.result(request, owner), Failure)
        answer = self.desk.answer_of(owner, request)
        assert isinstance(answer, Answered)
        return answer.extra

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.desk.ready(0)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path / "state", Limits(), Clock())
    yield made
    made.desk.close()


def limited(service: Service, **limits: Any) -> Service:
    service.desk.close()
    return Service(service.folder, Limits(**limits), service.clock)


def status(call: Any, *args: Any, **more: Any) -> int:
    """The status with which a call is refused."""
    with pytest.raises(Refused) as caught:
        call(*args, **more)
    assert "\n" not in str(caught.value)
    return caught.value.status


# Order ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_operations_run_in_order_once_whatever_order_they_come_in(service: Service, seed: int) -> None:
    draw = random.Random(seed)
    owners = {"ann": service.model("ann"), "bob": service.model("bob")}
    wanted = {number: step() if number % 4 == 0 else one_pass(number + 20) for number in range(1, 17)}
    sent = [(owner, number) for owner in owners for number in wanted] * 2
    draw.shuffle(sent)
    requests: dict[tuple[str, int], str] = {}
    for owner, number in sent:
        request = service.desk.submit(owner, owners[owner], number, wanted[number])
        assert requests.setdefault((owner, number), request) == request
        if draw.random() < 0.3:
            service.run()
    service.run()
    assert len(set(requests.values())) == 32
    for owner, model in owners.items():
        assert [ticket.number for ticket in service.engine.ran if ticket.model == model] == list(range(17))
        for number in wanted:
            answer = service.desk.answer_of(owner, requests[owner, number])
            assert isinstance(answer, Answered)
            assert isinstance(answer.result, StepResult if number % 4 == 0 else PassResult), number


def test_a_step_waits_for_the_answers_of_its_passes_and_passes_wait_for_nothing(service: Service) -> None:
    model = service.model()
    for number in (1, 2, 4):
        service.desk.submit("ann", model, number, one_pass(number))
    service.desk.submit("ann", model, 3, step())
    tickets = service.desk.ready(0)
    assert [(ticket.number, ticket.fresh) for ticket in tickets] == [(1, True), (2, False)]
    service.desk.answer(tickets[1].request, service.engine.run(tickets[1]))
    assert service.desk.ready(0) == []
    service.engine.last.clear()
    service.desk.answer(tickets[0].request, service.engine.run(tickets[0]))
    tickets = service.desk.ready(0)
    assert [(ticket.number, ticket.fresh) for ticket in tickets] == [(3, False), (4, True)]


def test_samples_have_no_order(service: Service) -> None:
    sampler = service.desk.open_sampler("ann", service.session(), 0, path=None)
    for number in (7, 3):
        request, sequences = service.desk.sample("ann", sampler, number, SAMPLE)
        assert service.desk.sample("ann", sampler, number, SAMPLE) == (request, sequences)
        assert len(set(sequences)) == SAMPLE.num_samples
    assert [ticket.number for ticket in service.desk.ready(0)] == [7, 3]
    assert service.desk.ready(0) == []


def test_ready_returns_when_something_comes(service: Service) -> None:
    import threading

    model = service.model()
    timer = threading.Timer(0.1, service.desk.submit, ("ann", model, 1, one_pass(1)))
    timer.start()
    assert len(service.desk.ready(60)) == 1
    timer.join()


# Failures -------------------------------------------------------------------------------------------------------------


def windows(service: Service, model: str, *operations: Any) -> list[Any]:
    """The results of operations from number 1."""
    requests = [service.desk.submit("ann", model, number, one) for number, one in enumerate(operations, 1)]
    return [service.result(request) for request in requests]


def test_a_failed_pass_fails_the_next_step_alone(service: Service) -> None:
    model = service.model()
    bad = one_pass(BAD_TOKEN)
    found = windows(service, model, one_pass(1), bad, one_pass(2), step(), one_pass(3), step())
    assert [isinstance(result, Failure) for result in found] == [False, True, False, True, False, False]
    assert found[3].by_user
    assert "operation 2 failed: an unlucky token" in found[3].message
    assert 4 not in [ticket.number for ticket in service.engine.ran]
    other = service.model()
    assert windows(service, other, one_pass(3), step())[-1] == found[-1], "gradients of a failed window were used"


def test_a_step_needs_a_backward_pass_since_the_last_step(service: Service) -> None:
    model = service.model()
    found = windows(service, model, step(), one_pass(1, backward=False), step(), one_pass(2), step(), step())
    assert [isinstance(result, Failure) for result in found] == [True, False, True, False, False, True]
    assert "no gradients" in found[0].message


def test_a_step_that_the_engine_fails_ends_the_window(service: Service) -> None:
    model = service.model()
    found = windows(service, model, one_pass(1), step(BAD_RATE), step(), one_pass(2), step())
    assert [isinstance(result, Failure) for result in found] == [False, True, True, False, False]
    assert windows(service, service.model(), one_pass(2), step())[-1] == found[-1]


def test_a_model_that_was_not_created_fails_all_its_operations(service: Service) -> None:
    model = service.model(method="bad")
    failure = service.result(service.desk.submit("ann", model, 1, one_pass(1)))
    assert failure.by_user
    assert "no such method" in failure.message
    assert service.desk.model_of("ann", model).state == "failed"


def test_a_rejected_operation_uses_up_its_number(service: Service) -> None:
    model = service.model()
    later = service.desk.submit("ann", model, 3, one_pass(3))
    service.desk.submit("ann", model, 1, one_pass(1))
    rejected = service.desk.reject("ann", model, 2, Pass, "no such loss")
    assert service.desk.reject("ann", model, 2, Pass, "no such loss") == rejected
    failure = service.result(rejected)
    assert (failure.message, failure.by_user) == ("no such loss", True)
    assert isinstance(service.result(later), PassResult)
    failed, good = (service.desk.submit("ann", model, number, step()) for number in (4, 6))
    assert "operation 2 failed: no such loss" in service.result(failed).message
    service.desk.submit("ann", model, 5, one_pass(5))
    assert isinstance(service.result(good), StepResult)
    service.desk.submit("ann", model, 7, one_pass(5))
    service.desk.reject("ann", model, 8, Save, "no such name")
    service.desk.save("ann", model, 10, "w", kind="weights")
    assert isinstance(service.result(service.desk.submit("ann", model, 9, step())), StepResult)
    assert status(service.desk.submit, "ann", model, 0, step()) == 400
    assert status(service.desk.load, "ann", model, 0, "x", optimizer=False) == 400


def test_a_model_that_left_the_memory_is_rebuilt_with_its_next_operation(service: Service) -> None:
    model = service.model()
    windows(service, model, one_pass(1), step(), one_pass(2), one_pass(3, backward=False))
    weights = service.engine.weights[model]
    service.engine.drop(model)
    service.run()
    assert service.engine.weights == {}
    service.engine.ran.clear()
    result = service.result(service.desk.submit("ann", model, 5, step()))
    assert [ticket.number for ticket in service.engine.ran] == [0, 1, 2, 3, 5]
    assert result == windows(service, service.model(), one_pass(1), step(), one_pass(2), step())[-1]
    assert weights
    service.engine.drop(model)
    session = model.split(":")[0]
    service.desk.finish_session("ann", session)
    service.wait(610)
    assert status(service.desk.model_of, "ann", model) == 404, "what is only repeated is no work"


# Owners, ids and limits -----------------------------------------------------------------------------------------------


def test_others_find_nothing(service: Service) -> None:
    model = service.model()
    path = service.saved(model, 1)["path"]
    request = service.desk.submit("ann", model, 2, one_pass(1))
    session, desk = model.split(":")[0], service.desk
    sampler = desk.open_sampler("ann", session, 0, path=path)
    mine = service.model("bob")
    calls: list[tuple[Any, ...]] = [
        (desk.heartbeat, session),
        (desk.finish_session, session),
        (desk.submit, model, 3, one_pass(1)),
        (desk.submit, model, 2, one_pass(1)),
        (desk.model_of, model),
        (desk.checkpoint_of, path),
        (desk.delete_checkpoint, path),
        (desk.sampler_of, sampler),
        (desk.sample, sampler, 0, SAMPLE),
        (desk.answer_of, request),
        (desk.taken, request),
    ]
    for call, *rest in calls:
        assert status(call, "bob", *rest) == 404, call
    assert status(desk.create, "bob", session, 5, CREATE, info={}) == 404
    assert status(desk.save, "bob", model, 3, "x", kind="weights") == 404
    assert status(desk.load, "bob", mine, 1, path, optimizer=True) == 404
    assert status(desk.open_sampler, "bob", session, 9, path=None) == 404
    assert status(desk.open_sampler, "bob", mine.split(":")[0], 9, path=path) == 404
    assert desk.checkpoints("bob") == []
    assert status(desk.create, "bob", mine.split(":")[0], 1, replace(CREATE, folder=path), info={}) == 404


def test_limits_of_models_rank_sessions_and_tokens(service: Service) -> None:
    service = limited(service, models=2, rank=8, sessions=2, tokens=10)
    session = service.session()
    service.model(session=session)
    service.model(session=session, number=1)
    assert status(service.desk.create, "ann", session, 2, CREATE, info={}) == 400
    service.model("bob")
    service.session()
    assert status(service.desk.open_session, "ann", metadata={}) == 400
    bob = service.session("bob")
    with pytest.raises(Refused, match="rank: 9 is above the limit of 8"):
        service.desk.create("bob", bob, 0, replace(CREATE, rank=9), info={})
    with pytest.raises(Refused, match="tokens of a request: 11 is above the limit of 10"):
        service.desk.submit("ann", f"{session}:train:0", 1, one_pass(*range(11)))
    sampler = service.desk.open_sampler("ann", session, 0, path=None)
    assert status(service.desk.sample, "ann", sampler, 0, replace(SAMPLE, max_tokens=5)) == 400
    service.desk.finish_session("ann", session)
    service.model(session=service.session())
    service.desk.close()


def test_a_full_queue_refuses_all_but_what_others_wait_for(service: Service) -> None:
    service = limited(service, queued_bytes=3500)
    model = service.model()
    for number in (2, 3):
        service.desk.submit("ann", model, number, one_pass(number), size=1500)
    assert status(service.desk.submit, "ann", model, 4, one_pass(4), size=1200) == 429
    assert status(service.desk.submit, "ann", model, 9, one_pass(4), size=3501) == 413
    assert service.desk.submit("ann", model, 3, one_pass(3), size=1500)  # a retry
    service.desk.submit("bob", service.model("bob"), 1, one_pass(4), size=1200)
    request = service.desk.submit("ann", model, 1, one_pass(1), size=1200)
    assert service.desk.answer_of("ann", request) == Unanswered("paused_capacity")
    assert status(service.desk.submit, "ann", model, 4, one_pass(4), size=1200) == 429
    service.run()
    assert service.desk.submit("ann", model, 4, one_pass(4), size=1200)
    assert service.desk.numbers()["queued_bytes"] == 1200
    service.desk.close()


# Weights --------------------------------------------------------------------------------------------------------------


def test_saved_weights_come_back(service: Service) -> None:
    model = service.model()
    windows(service, model, one_pass(1), step())
    path = service.saved(model, 3)["path"]
    assert path == f"tinker://{model}/weights/w"
    at_save = service.engine.weights[model]
    for number, one in enumerate((one_pass(2), step()), 4):
        service.desk.submit("ann", model, number, one)
    service.result(service.desk.load("ann", model, 6, path, optimizer=True))
    assert service.engine.weights[model] == at_save
    (known,) = service.desk.checkpoints("ann")
    assert (known.key, known.create) == (path, CREATE)
    assert known.size > 0
    session = model.split(":")[0]
    service.desk.create("ann", session, 1, replace(CREATE, folder=path, optimizer=True), info={})
    service.run()
    assert service.desk.model_of("ann", f"{session}:train:1").state == "active"
    origin = replace(CREATE, folder=str(service.folder / known.folder), optimizer=True)
    assert service.desk.origin(f"{session}:train:1") == origin


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", ".hidden", "x" * 65, "a\n", "ä"])
def test_names_of_weights_are_checked(service: Service, name: str) -> None:
    assert status(service.desk.save, "ann", service.model(), 1, name, kind="weights") == 400


def test_a_name_is_used_once_unless_it_is_overwritten(service: Service) -> None:
    model = service.model()
    service.saved(model, 1)
    assert status(service.desk.save, "ann", model, 2, "w", kind="weights") == 409
    assert not service.engine.turn()
    service.desk.save("ann", model, 2, "v", kind="weights")
    assert status(service.desk.save, "ann", model, 3, "v", kind="weights") == 409  # not yet written
    (before,) = service.desk.checkpoints("ann")
    service.saved(model, 3, overwrite=True)
    after = service.desk.checkpoint_of("ann", before.key)
    assert after.folder != before.folder
    service.wait(10)
    assert (service.folder / before.folder).exists(), "a replay of an operation may need it"
    service.engine.save(model)
    service.wait(10)
    assert not (service.folder / before.folder).exists()
    assert (service.folder / after.folder).exists()


def test_a_number_seen_before_returns_its_future_though_the_name_exists_now(service: Service) -> None:
    model = service.model()
    request = service.desk.save("ann", model, 1, "w", kind="weights")
    service.run()
    assert service.desk.save("ann", model, 1, "w", kind="weights") == request
    path = f"tinker://{model}/weights/w"
    load = service.desk.load("ann", model, 2, path, optimizer=True)
    service.desk.delete_checkpoint("ann", path)
    assert service.desk.load("ann", model, 2, path, optimizer=True) == load
    assert not isinstance(service.result(load), Failure), "the folder is kept for the load"


def test_an_optimizer_is_in_weights_only(service: Service) -> None:
    model = service.model()
    path = service.saved(model, 1, kind="sampler_weights")["path"]
    assert status(service.desk.load, "ann", model, 2, path, optimizer=True) == 400
    service.result(service.desk.load("ann", model, 2, path, optimizer=False))
    with pytest.raises(Refused, match="did you mean"):
        service.desk.load("ann", model, 3, path + "x", optimizer=False)


def test_weights_end_with_their_time(service: Service) -> None:
    model = service.model()
    path = service.saved(model, 1, ttl_seconds=100)["path"]
    folder = service.folder / service.desk.checkpoint_of("ann", path).folder
    service.engine.save(model)
    service.wait(99)
    assert folder.exists()
    service.wait(10)
    assert status(service.desk.checkpoint_of, "ann", path) == 404
    assert not folder.exists()


def test_temporary_weights_live_as_long_as_their_session(service: Service) -> None:
    model = service.model()
    session = model.split(":")[0]
    told = service.saved(model, 1, None, session_number=4)
    sampler = told["sampling_session_id"]
    assert service.desk.sampler_of("ann", sampler).path == told["path"]
    assert service.desk.open_sampler("ann", session, 4, path=None) == sampler
    request, _ = service.desk.sample("ann", sampler, 0, SAMPLE)
    assert not isinstance(service.result(request), Failure)
    folder = service.folder / service.desk.sampler_of("ann", sampler).folder
    assert service.desk.checkpoints("ann") == []
    service.wait(500)
    service.desk.heartbeat("ann", session)
    service.wait(599)
    service.engine.unload()
    assert folder.exists()
    service.wait(2)  # lapsed
    service.engine.unload()
    service.wait(598)
    assert folder.exists()
    service.wait(10)
    assert not folder.exists()
    assert status(service.desk.sample, "ann", sampler, 1, SAMPLE) == 404


def test_the_disk_limit_drops_temporary_weights_that_rest(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    write = desk_engine._write
    monkeypatch.setattr(desk_engine, "_write", lambda folder, state: write(folder, {**state, "large": "x" * 20_000}))
    service = limited(service, disk_bytes=40_000)  # two files
    model = service.model()
    first = service.saved(model, 1, None, session_number=0)["sampling_session_id"]
    waiting = [service.desk.save("ann", model, number, f"w{number}", kind="weights") for number in (2, 3)]
    assert service.result(waiting[0]) == Done()
    assert "of requests, answers and saved weights reach the limit of 40.00 kB" in service.result(waiting[1]).message
    passed = one_pass(*range(20, 2020))
    assert status(service.desk.submit, "ann", model, 4, passed) == 400
    service.clock.now += 601
    assert isinstance(service.result(service.desk.submit("ann", model, 4, passed)), PassResult)
    assert status(service.desk.sampler_of, "ann", first) == 404
    service.desk.close()


# What expires ---------------------------------------------------------------------------------------------------------


def test_answers_are_kept_for_a_while_after_they_were_fetched(service: Service) -> None:
    model = service.model()
    request = service.desk.submit("ann", model, 1, one_pass(1))
    done: list[int] = []
    service.desk.when_done(request, lambda: done.append(1))
    assert service.desk.answer_of("ann", request) == Unanswered("active")
    assert not done
    service.run()
    service.desk.when_done(request, lambda: done.append(2))
    assert done == [1, 2]
    service.wait(5000)
    first = service.desk.answer_of("ann", request)
    service.desk.taken("ann", request)
    service.wait(599)
    again = service.desk.answer_of("ann", request)
    assert isinstance(first, Answered)
    assert isinstance(again, Answered)
    assert isinstance(again.result, PassResult)
    assert isinstance(first.result, PassResult)
    assert again.result.loss == first.result.loss
    service.wait(5)
    assert status(service.desk.answer_of, "ann", request) == 404
    assert status(service.desk.answer_of, "ann", "nothing") == 404
    service.engine.save(model)
    service.wait(10)
    assert status(service.desk.submit, "ann", model, 1, one_pass(1)) == 410


def test_a_session_lapses_and_comes_back_with_its_model(service: Service) -> None:
    model = service.model()
    found = windows(service, model, one_pass(1), step())
    service.wait(601)
    assert service.desk.lapsed([model]) == [model]
    service.engine.unload()
    request = service.desk.submit("ann", model, 3, one_pass(2))
    assert service.desk.lapsed([model]) == []
    service.result(request)
    assert int(service.engine.weights[model], 16) == found[-1].grad_norm


def test_a_finished_session_is_over(service: Service) -> None:
    model = service.model()
    session = model.split(":")[0]
    path = service.saved(model, 1)["path"]
    service.desk.finish_session("ann", session)
    service.desk.finish_session("ann", session)
    assert status(service.desk.heartbeat, "ann", session) == 410
    assert status(service.desk.submit, "ann", model, 2, one_pass(1)) == 410
    assert service.desk.lapsed([model]) == [model]
    service.engine.unload()
    service.wait(610)
    assert status(service.desk.model_of, "ann", model) == 404
    assert status(service.desk.heartbeat, "ann", session) == 404
    known = service.desk.checkpoint_of("ann", path)
    assert sorted(item.name for item in (service.folder / known.folder).parents[1].iterdir()) == ["weights"]
    assert service.desk.numbers()["models"] == 0


def test_numbers(service: Service) -> None:
    model = service.model()
    windows(service, model, one_pass(1), one_pass(BAD_TOKEN))
    found = service.desk.numbers()
    assert (found["sessions"], found["models"], found["answers_kept"]) == (1, 1, 3)
    assert (found["pass_total"], found["failures_total"], found["queued_bytes"]) == (2, 1, 0)


def test_ids_cannot_be_guessed(service: Service) -> None:
    ids = {service.session() for _ in range(20)}
    assert len(ids) == 20
    assert all(len(one) == 32 for one in ids)
    assert len({a[:4] for a, _ in itertools.pairwise(sorted(ids))}) > 10
