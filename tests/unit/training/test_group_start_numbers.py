"""Adapters whose update is still zero have the numbers of the base, so that one is evaluated for all with its data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_tiedlora.training.loop import of_start


def member(name: str, data: object, *, starts_at_base: bool = True, init_from: str | None = None, rows: int = 2) -> Any:
    plan = SimpleNamespace(
        settings=SimpleNamespace(init_from=init_from, eval_batch_size=16),
        adapter=SimpleNamespace(method_spec=SimpleNamespace(starts_at_base=starts_at_base)),
        batches=SimpleNamespace(micro_batch_size=rows),
        max_new_tokens=8,
    )
    return SimpleNamespace(name=name, data=data, plan=plan, failure=None)


def evaluated(members: list[Any], failing: str = "", *, later: str = "") -> tuple[list[list[str]], dict[str, str]]:
    """The names of each evaluation, and what was found of each member: whose evaluation it was."""
    calls: list[list[str]] = []

    def evaluate(some: Any) -> dict[str, str]:
        calls.append([one.name for one in some])
        for one in some:
            one.failure = "bad answers" if one.name in (failing, later) else one.failure
        return {one.name: f"of {one.name}" for one in some if one.failure is None}

    return calls, of_start(members, evaluate)


def test_one_for_all_that_are_still_the_base() -> None:
    data, other = object(), object()
    members = [
        *(member("a", data), member("b", data), member("c", other)),
        *(member("d", data, starts_at_base=False), member("e", data, init_from="x"), member("f", data, rows=3)),
        member("g", other),
    ]
    calls, found = evaluated(members)
    assert calls == [["a", "c", "d", "e", "f"], []]
    assert found == {"b": "of a", "g": "of c"} | {name: f"of {name}" for name in "acdef"}


def test_one_that_fails_does_not_speak_for_others() -> None:
    data = object()
    calls, found = evaluated([member("a", data), member("b", data), member("c", data)], failing="a")
    assert calls == [["a"], ["b", "c"]] and found == {"b": "of b", "c": "of c"}
    _, found = evaluated([member("a", data), member("b", data), member("c", data)], failing="a", later="b")
    assert found == {"c": "of c"}
