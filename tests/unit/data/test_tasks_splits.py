"""Which rows of the hub a split is made of, how many there are, and that the cut depends on the seed alone."""

from __future__ import annotations

from typing import Any

import pytest
from task_files import HUB_ROWS, refusal, write_rows

from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example

IWSLT = "hf://datasets/IWSLT/iwslt2017@refs%2Fconvert%2Fparquet/iwslt2017-de-en"


def plain(name: str, config: str | None, split: str) -> tuple[Any, ...]:
    return (name, config), {"split": split}


def parquet(split: str) -> tuple[Any, ...]:
    return ("parquet",), {"data_files": {split: f"{IWSLT}/{split}/*.parquet"}, "split": split}


# What `datasets.load_dataset` is called with, for our splits.
CALLS: dict[str, dict[str, tuple[Any, ...]]] = {
    "squad": {
        "train": plain("rajpurkar/squad", None, "train"),
        "validation": plain("rajpurkar/squad", None, "train"),
        "test": plain("rajpurkar/squad", None, "validation"),
    },
    "dialogsum": {name: plain("knkarthick/dialogsum", None, name) for name in ("train", "validation", "test")},
    "hellaswag": {
        "train": plain("Rowan/hellaswag", None, "train"),
        "validation": plain("Rowan/hellaswag", None, "train"),
        "test": plain("Rowan/hellaswag", None, "validation"),
    },
    "iwslt2017": {name: parquet(name) for name in ("train", "validation", "test")},
    "gsm8k": {
        "train": plain("openai/gsm8k", "main", "train"),
        "validation": plain("openai/gsm8k", "main", "train"),
        "test": plain("openai/gsm8k", "main", "test"),
    },
}

# Rows of the hub's training part, and what is left of them and held out. Where nothing is taken out, a few will do.
SIZES = {
    "squad": (87_599, 82_799, 4_800),
    "hellaswag": (39_905, 37_905, 2_000),
    "gsm8k": (7_473, 7_000, 473),
    "dialogsum": (20, 20, 20),
    "iwslt2017": (20, 20, 20),
}


class Hub:
    """In place of `datasets.load_dataset`: the same row `num_rows` times, with its number where the task shows it."""

    def __init__(self, task: str, num_rows: int) -> None:
        self.task, self.num_rows = task, num_rows
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, **keywords: Any) -> list[dict[str, Any]]:
        self.calls.append((args, keywords))
        return [numbered(self.task, number) for number in range(self.num_rows)]


def numbered(task: str, number: int) -> dict[str, Any]:
    row = HUB_ROWS[task]
    if task == "iwslt2017":
        return {"translation": {"de": f"Satz {number}", "en": "x"}}
    shown = {"squad": "question", "dialogsum": "dialogue", "hellaswag": "ctx_a", "gsm8k": "question"}[task]
    return {**row, shown: f"row {number}"}


def hub(monkeypatch: pytest.MonkeyPatch, task: str, num_rows: int) -> Hub:
    import datasets

    stand_in = Hub(task, num_rows)
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


@pytest.mark.parametrize("task", CALLS)
def test_rows_of_the_hub(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, num_train, num_validation = SIZES[task]
    stand_in = hub(monkeypatch, task, num_rows)
    parts: dict[str, list[Example]] = {}
    for split in ("train", "validation", "test"):
        stand_in.num_rows = 15 if split == "test" else num_rows
        parts[split] = load_split(task, split, files={}, seed=1)
        assert stand_in.calls.pop() == CALLS[task][split] and not stand_in.calls
    assert {split: len(part) for split, part in parts.items()} == {
        "train": num_train,
        "validation": num_validation,
        "test": 15,
    }
    assert parts["test"][-1].source == f"{_hub_id(task)}[{CALLS[task]['test'][1]['split']}]: row 15"
    held_out = {sample.source for sample in parts["validation"]}
    if num_train < num_rows:  # carved: nothing is in both, nothing is lost, and the order is the file's
        kept = [sample.source for sample in parts["train"]]
        assert not held_out & set(kept) and len(held_out | set(kept)) == num_rows
        numbers = [int(source.rsplit(" ", 1)[1]) for source in kept]
        assert numbers == sorted(numbers)
        # Random, not the first or the last rows: their mean is that of all, within 5 standard errors.
        mean = sum(int(source.rsplit(" ", 1)[1]) for source in held_out) / len(held_out)
        assert abs(mean / num_rows - 0.5) < 5 * 0.29 / num_validation**0.5


@pytest.mark.parametrize("task", ["squad", "hellaswag", "gsm8k"])
def test_the_cut_depends_on_the_seed_alone(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, task, 200)
    first, again, other = (load_split(task, "validation", files={}, seed=seed) for seed in (1, 1, 2))
    assert first == again and len(first) == len(other) == 10
    assert {sample.source for sample in first} != {sample.source for sample in other}
    assert load_split(task, "validation", files={}, seed=1, limit=3) == first[:3]


def test_a_task_s_own_hub_id_may_be_given_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As --train_file it is read as the task reads it; another id is read with our names of its splits."""
    for task in CALLS:
        stand_in = hub(monkeypatch, task, 40)
        load_split(task, "test", files={"test": _hub_id(task)}, seed=0)
        assert stand_in.calls == [CALLS[task]["test"]]
    stand_in = hub(monkeypatch, "gsm8k", 40)
    load_split("gsm8k", "test", files={"test": "someone/maths"}, seed=0)
    assert stand_in.calls == [plain("someone/maths", None, "test")]


@pytest.mark.parametrize("task", CALLS)
def test_a_hub_that_cannot_be_reached(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refusal(lambda: load_split(task, "test", files={}, seed=0))
    split = CALLS[task]["test"][1]["split"]
    assert _hub_id(task) in message and f"split {split!r} cannot be loaded (no route to the hub)" in message
    assert "give a local file" in message
    hub(monkeypatch, task, 0)
    assert "holds no rows" in refusal(lambda: load_split(task, "test", files={}, seed=0))


def test_the_user_s_own_files_are_never_mixed_with_the_hub_s(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in CALLS:
        stand_in = hub(monkeypatch, task, 40)
        files = {"train": write_rows(tmp_path / f"{task}.jsonl", [numbered(task, number) for number in range(40)])}
        sizes = [len(load_split(task, split, files=files, seed=0)) for split in ("train", "validation")]
        assert sizes == [38, 2] and not stand_in.calls
        assert "--test_file" in refusal(lambda task=task, files=files: load_split(task, "test", files=files, seed=0))


def _hub_id(task: str) -> str:
    return "IWSLT/iwslt2017" if task == "iwslt2017" else str(CALLS[task]["test"][0][0])
