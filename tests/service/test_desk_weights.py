"""The desk: saved weights, samplers, and what expires."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.desk_engine import BAD_TOKEN, CREATE, SAMPLE, one_pass, step
from support.desk_service import Clock, Service, limited, status, windows

from megatron_tiedlora.service.futures import Answer, Limits, Pending, Refused
from megatron_tiedlora.service.operations import Failure, PassResult


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path / "state", Limits(), Clock())
    yield made
    made.desk.close()


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
    assert (known.key, known.create, known.info) == (path, CREATE, {"k": "v"})
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


def test_the_disk_limit_drops_temporary_weights_that_rest(service: Service) -> None:
    service = limited(service, disk_bytes=40)  # two files
    model = service.model()
    first = service.saved(model, 1, None, session_number=0)["sampling_session_id"]
    service.saved(model, 2, None, session_number=1)
    assert status(service.desk.save, "ann", model, 3, None, kind="sampler_weights") == 400
    service.clock.now += 601
    service.saved(model, 3, None, session_number=2)
    assert status(service.desk.sampler_of, "ann", first) == 404
    service.desk.close()


# What expires ---------------------------------------------------------------------------------------------------------


def test_answers_are_kept_for_a_while_after_they_were_fetched(service: Service) -> None:
    model = service.model()
    request = service.desk.submit("ann", model, 1, one_pass(1))
    done: list[int] = []
    service.desk.when_done(request, lambda: done.append(1))
    assert service.desk.answer_of("ann", request) == Pending("active")
    assert not done
    service.run()
    service.desk.when_done(request, lambda: done.append(2))
    assert done == [1, 2]
    service.wait(5000)
    first = service.desk.answer_of("ann", request)
    service.desk.taken("ann", request)
    service.wait(599)
    again = service.desk.answer_of("ann", request)
    assert isinstance(first, Answer)
    assert isinstance(again, Answer)
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
    assert service.desk.lapsed() == [model]
    service.engine.unload()
    request = service.desk.submit("ann", model, 3, one_pass(2))
    assert service.desk.lapsed() == []
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
    assert service.desk.lapsed() == [model]
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
