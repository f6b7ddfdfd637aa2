"""The desk: owners, order, retries, limits and failures."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.desk_engine import BAD_RATE, BAD_TOKEN, CREATE, SAMPLE, one_pass, step
from support.desk_service import Clock, Service, limited, status, windows

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import FolderTaken
from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.futures import Answer, Limits, Pending, Refused
from megatron_tiedlora.service.operations import Failure, Pass, PassResult, Save, Step, StepResult


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path / "state", Limits(), Clock())
    yield made
    made.desk.close()


def test_the_folder_is_private_and_has_one_owner(service: Service, tmp_path: Path) -> None:
    assert service.folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FolderTaken):
        Desk.open(service.folder, Limits())
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="not a private folder"):
        Desk.open(tmp_path / "link", Limits())


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
        for number, operation in wanted.items():
            answer = service.desk.answer_of(owner, requests[owner, number])
            assert isinstance(answer, Answer)
            assert isinstance(answer.result, StepResult if number % 4 == 0 else PassResult), number
            assert type(answer.operation) is type(operation)


def test_a_step_waits_for_the_answers_of_its_passes_and_passes_wait_for_nothing(service: Service) -> None:
    model = service.model()
    for number in (1, 2, 4):
        service.desk.submit("ann", model, number, one_pass(number))
    service.desk.submit("ann", model, 3, step())
    tickets = service.desk.ready(0)
    assert [ticket.number for ticket in tickets] == [1, 2]
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
    model = service.model()
    timer = threading.Timer(0.1, service.desk.submit, ("ann", model, 1, one_pass(1)))
    timer.start()
    assert len(service.desk.ready(60)) == 1
    timer.join()


def test_threads_of_clients_beside_the_engine(service: Service) -> None:
    """Each client sends a window in a random order and waits for its answers; the engine saves states meanwhile."""
    models = [service.model(owner) for owner in ("ann", "bob", "ann", "bob")]
    over, found = threading.Event(), dict[str, list[Any]]()

    def engine() -> None:
        while not over.is_set():
            tickets = service.desk.ready(0.05)
            for ticket in tickets:
                service.desk.answer(ticket.request, service.engine.run(ticket))
            for model in {ticket.model for ticket in tickets if isinstance(ticket.operation, Step)}:
                service.engine.save(model)

    def client(index: int) -> None:
        owner, draw, model = ("ann", "bob")[index % 2], random.Random(index), models[index]
        for begin in range(1, 41, 4):
            numbers = draw.sample(range(begin, begin + 4), 4)
            sent = {}
            for number in numbers:
                operation = step() if number == begin + 3 else one_pass(20 + number)
                sent[number] = service.desk.submit(owner, model, number, operation)
            for _, request in sorted(sent.items()):
                done = threading.Event()
                service.desk.when_done(request, done.set)
                assert done.wait(60)
                answer = service.desk.answer_of(owner, request)
                assert isinstance(answer, Answer)
                service.desk.taken(owner, request)
        found[model] = [answer.result]

    threads = [threading.Thread(target=engine), *(threading.Thread(target=client, args=(index,)) for index in range(4))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join(120)
    over.set()
    threads[0].join(10)
    assert not any(thread.is_alive() for thread in threads)
    (result,) = {result.grad_norm for (result,) in found.values()}
    assert len(found) == 4
    assert result


# Failures -------------------------------------------------------------------------------------------------------------


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
    assert service.desk.answer_of("ann", request) == Pending("paused_capacity")
    assert status(service.desk.submit, "ann", model, 4, one_pass(4), size=1200) == 429
    service.run()
    assert service.desk.submit("ann", model, 4, one_pass(4), size=1200)
    assert service.desk.numbers()["queued_bytes"] == 1200
    service.desk.close()
