"""Several sources of rows with weights, what is held out of them, templates of prompts, and which rows of the hub a
split is made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.task_files import HUB_ROWS, refusal, write_rows

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.data.sources import Source, mixed, parse_sources
from megatron_tiedlora.data.splits import load_split, read_split
from megatron_tiedlora.data.task import Example, Reading, join_answer


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{number}", "completion": "x"} for number in range(count)]


def prompts(given: str, split: Any = "train", seed: int = 0, **files: str) -> list[str]:
    """The prompts of a split, of which nothing is held out unless it is the point."""
    chosen = {"train": given, "validation": files.pop("validation", given), **files}
    return [sample.prompt for sample in load_split("custom", split, files=chosen, seed=seed)]


# Several sources --------------------------------------------------------------------------------------------


def test_several_files_are_read_one_after_another(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 3)), write_rows(tmp_path / "b.json", rows("b", 2))
    assert prompts(f"{a}, {b}") == ["a0", "a1", "a2", "b0", "b1"]
    assert prompts(write_rows(tmp_path / "a,b.jsonl", rows("c", 1))) == ["c0"]  # a name that exists is one file


def test_weights_are_shares_of_the_samples(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 90)), write_rows(tmp_path / "b.jsonl", rows("b", 20))
    found = prompts(f"{a}:0.5,{b}:0.5")
    counts = Counter(found)
    assert sum(count for name, count in counts.items() if name[0] == "a") == 90  # none is lost, and none repeated
    assert sum(count for name, count in counts.items() if name[0] == "b") == 90  # each four or five times
    assert {counts[f"b{number}"] for number in range(20)} == {4, 5} and len(counts) == 110
    assert found == prompts(f"{a}:0.5,{b}:0.5") and found != prompts(f"{a}:0.5,{b}:0.5", seed=1)
    quarter = Counter(name[0] for name in prompts(f"{a}:0.75,{b}:.25"))
    assert quarter == {"a": 90, "b": 30}
    sources = parse_sources(f"{a}:0.5,{b}:0.5", "--train_file")
    assert mixed(sources, [90, 20], np.zeros(110, bool), seed=0)[1] == [
        f"{a}: 90 rows make 90 samples, 1.00 of each", f"{b}: 20 rows make 90 samples, 4.50 of each"
    ]  # fmt: skip
    assert mixed([Source("a"), Source("b")], [1, 1], np.zeros(2, bool), seed=0)[1] == []
    assert [name[0] for name in prompts(f"{a}:0.9,{b}:0.1")] == ["a"] * 180 + ["b"] * 20


def test_held_out_rows_are_taken_out_before_rows_are_repeated(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 90)), write_rows(tmp_path / "b.jsonl", rows("b", 30))
    files = {"train": f"{a}:0.5,{b}:0.5"}
    train, held_out = (load_split("custom", split, files=files, seed=3) for split in ("train", "validation"))
    held = [sample.prompt for sample in held_out]
    assert len(held) == len(set(held)) == 6 and not set(held) & {sample.prompt for sample in train}
    shares = Counter(sample.prompt[0] for sample in train)
    assert shares["a"] == shares["b"] == 90 - sum(name[0] == "a" for name in held)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a.jsonl:0.5,b.jsonl:0.6", ["0.5 + 0.6 = 1.1", "sum to 1"]),
        ("a.jsonl:0.5,b.jsonl", ["b.jsonl has no weight", "all or none"]),
        ("a.jsonl:0,b.jsonl:1", ["0 + 1", "above 0"]),
        ("a.jsonl,,b.jsonl", ["between the commas is empty"]),
        ("a.jsonl:0.5", ["the weights are 0.5"]),
    ],
)
def test_weights_that_do_not_fit(given: str, words: list[str]) -> None:
    message = refusal(lambda: parse_sources(given, "--train_file"))
    assert message.startswith(f"--train_file {given}: ") and all(word in message for word in words)
    for flag in ("--validation_file", "--test_file"):
        message = refusal(lambda flag=flag: parse_sources("a.jsonl:0.5,b.jsonl:0.5", flag))
        assert message.startswith(f"{flag} a.jsonl:0.5,b.jsonl:0.5: only --train_file takes weights")


def test_a_weight_of_one_source_and_names_with_colons(tmp_path: Path) -> None:
    assert parse_sources("a/b:main:train", "--train_file") == (Source("a/b:main:train"),)
    both = (Source("a/b:main:train", 0.25), Source("c.csv", 0.75))
    assert parse_sources("a/b:main:train:0.25,c.csv:0.75", "--train_file") == both
    assert mixed([Source("a", 1.0)], [2], np.zeros(2, bool), seed=0)[0].tolist() == [0, 1]


def test_a_weight_that_repeats_rows_very_often_is_rejected() -> None:
    sources = (Source("a", 0.999), Source("b", 0.001))
    assert len(mixed(sources, [999, 1], np.zeros(1000, bool), seed=0)[0]) == 1000
    message = refusal(lambda: mixed(sources, [1, 2], np.zeros(3, bool), seed=0))
    assert len(mixed(sources, [1, 1], np.zeros(2, bool), seed=0)[0]) == 1000
    assert message.startswith("--train_file: for weight 0.999 of a, each of its 1 rows would be used 1,998 times")


def test_a_group_whose_rows_are_all_held_out(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 19)), write_rows(tmp_path / "b.jsonl", rows("b", 1))
    with pytest.raises(UserError) as caught:
        for seed in range(60):
            load_split("custom", "train", files={"train": f"{a},{b}"}, seed=seed)
    assert str(caught.value) == f"{b}: all rows were selected for validation; give --validation_file"


# Splits -----------------------------------------------------------------------------------------------------


def test_validation_is_taken_out_of_train(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", rows("p", 60))
    files = {"train": path}
    train, validation = (load_split("custom", name, files=files, seed=3) for name in ("train", "validation"))
    assert (len(train), len(validation)) == (57, 3) and len({sample.prompt for sample in train + validation}) == 60
    assert validation != load_split("custom", "validation", files=files, seed=4)
    # With a validation file of its own nothing is taken out of train.
    assert len(load_split("custom", "train", files={**files, "validation": path}, seed=3)) == 60
    one = {"train": write_rows(tmp_path / "one.jsonl", rows("p", 1))}
    assert len(load_split("custom", "train", files=one, seed=0)) == 1
    for task, split, given, said in (
        ("custom", "test", files, "--test_file"),
        ("custom", "validation", one, "--validation_file"),
        ("custom", "train", {}, "--train_file"),
        ("gms8k", "train", {}, "'gms8k'"),
    ):
        message = refusal(lambda split=split, task=task, given=given: load_split(task, split, files=given, seed=0))
        assert said in message


# Prompts ----------------------------------------------------------------------------------------------------


def test_prompt_template(tmp_path: Path) -> None:
    def custom(**options: Any) -> list[Example]:
        return load_split("custom", "test", files={"test": path}, seed=0, reading=Reading(**options))

    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "2+2", "completion": "4", "level": "easy", "id": 7}])
    (sample,) = custom(template=r"{level}\n{prompt} {{=}}")
    assert (sample.prompt, sample.completion) == ("easy\n2+2 {=}", " 4")
    assert "id, level, prompt" in refusal(lambda: custom(template="{question}"))
    for leaks in ("completion", "id"):
        assert repr(leaks) in refusal(lambda leaks=leaks: custom(template=f"{{{leaks}}}"))
    for broken in ("{prompt", "{prompt.x}", "{}", "{prompt!r}", "{prompt:>9}"):
        assert "--prompt_template" in refusal(lambda broken=broken: custom(template=broken))


def test_join_answer() -> None:
    pairs = (("A:", "4"), ("A: ", "4"), ("A:", "\n4"), ("", "4"))
    assert [join_answer(*pair) for pair in pairs] == [" 4", "4", "\n4", "4"]


# Splits of the hub ------------------------------------------------------------------------------------------

IWSLT = "hf://datasets/IWSLT/iwslt2017@refs%2Fconvert%2Fparquet/iwslt2017-de-en"


def by_name(name: str, config: str | None, split: str) -> tuple[Any, ...]:
    return (name, config), {"split": split}


def parquet(split: str) -> tuple[Any, ...]:
    return ("parquet",), {"data_files": {split: f"{IWSLT}/{split}/*.parquet"}, "split": split}


# Id, configuration, and the hub's names of our splits.
IDS: dict[str, tuple[str, str | None, tuple[str, str, str]]] = {
    "squad": ("rajpurkar/squad", None, ("train", "train", "validation")),
    "dialogsum": ("knkarthick/dialogsum", None, ("train", "validation", "test")),
    "hellaswag": ("Rowan/hellaswag", None, ("train", "train", "validation")),
    "gsm8k": ("openai/gsm8k", "main", ("train", "train", "test")),
}
SPLITS = ("train", "validation", "test")
# What `datasets.load_dataset` is called with, for our splits.
CALLS: dict[str, dict[str, tuple[Any, ...]]] = {
    **{
        task: {split: by_name(name, config, theirs) for split, theirs in zip(SPLITS, splits, strict=True)}
        for task, (name, config, splits) in IDS.items()
    },
    "iwslt2017": {name: parquet(name) for name in SPLITS},
}

# Rows of the hub's training part, and what is left of them and held out. Where nothing is taken out, a few will do.
SIZES = {
    "squad": (87_599, 82_799, 4_800),
    "hellaswag": (39_905, 37_905, 2_000),
    "gsm8k": (7_473, 7_000, 473),
    "dialogsum": (20, 20, 20),
    "iwslt2017": (20, 20, 20),
}


@dataclass
class Hub:
    """In place of `datasets.load_dataset`: the same row `num_rows` times, with its number where the task shows it."""

    task: str
    num_rows: int
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def __call__(self, *args: Any, **keywords: Any) -> list[dict[str, Any]]:
        self.calls.append((args, keywords))
        return [numbered(self.task, number) for number in range(self.num_rows)]


def numbered(task: str, number: int) -> dict[str, Any]:
    if task == "iwslt2017":
        return {"translation": {"de": f"Satz {number}", "en": "x"}}
    shown = {"dialogsum": "dialogue", "hellaswag": "ctx_a"}.get(task, "question")
    return {**HUB_ROWS[task], shown: f"row {number}"}


def hub(monkeypatch: pytest.MonkeyPatch, task: str, num_rows: int) -> Hub:
    import datasets

    stand_in = Hub(task, num_rows)
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


@pytest.mark.parametrize("task", [pytest.param(task, marks=[pytest.mark.slow] * (task == "squad")) for task in CALLS])
def test_rows_of_the_hub(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, num_train, num_validation = SIZES[task]
    stand_in = hub(monkeypatch, task, num_rows)
    parts: dict[str, list[Example]] = {}
    for split in SPLITS:
        stand_in.num_rows = 15 if split == "test" else num_rows
        parts[split] = load_split(task, split, files={}, seed=1)
        assert stand_in.calls.pop() == CALLS[task][split] and not stand_in.calls
    assert [len(part) for part in parts.values()] == [num_train, num_validation, 15]
    assert parts["test"][-1].source == f"{_hub_id(task)}[{CALLS[task]['test'][1]['split']}]: row 15"
    if num_train < num_rows:  # carved: nothing is in both, nothing is lost, and the order is the file's
        held_out = {sample.source for sample in parts["validation"]}
        kept = [sample.source for sample in parts["train"]]
        assert not held_out & set(kept) and len(held_out | set(kept)) == num_rows
        numbers = [int(source.rsplit(" ", 1)[1]) for source in kept]
        assert numbers == sorted(numbers)
        # Random, not the first or the last rows: their mean is that of all, within 5 standard errors.
        mean = sum(int(source.rsplit(" ", 1)[1]) for source in held_out) / len(held_out)
        assert abs(mean / num_rows - 0.5) < 5 * 0.29 / num_validation**0.5
        stand_in.num_rows = 200  # the cut depends on the seed alone
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
    assert stand_in.calls == [by_name("someone/maths", None, "test")]


@pytest.mark.parametrize("task", CALLS)
def test_a_hub_that_cannot_be_reached(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refusal(lambda: load_split(task, "test", files={}, seed=0))
    split = CALLS[task]["test"][1]["split"]
    assert _hub_id(task) in message
    assert f"split {split!r} cannot be loaded from the hub (no route to the hub)" in message
    assert "give a local file" in message
    hub(monkeypatch, task, 0)
    assert "has no rows" in refusal(lambda: load_split(task, "test", files={}, seed=0))


def test_the_user_s_own_files_are_never_mixed_with_the_hub_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in CALLS:
        stand_in = hub(monkeypatch, task, 40)
        files = {"train": write_rows(tmp_path / f"{task}.jsonl", [numbered(task, number) for number in range(40)])}
        sizes = [len(load_split(task, split, files=files, seed=0)) for split in ("train", "validation")]
        assert sizes == [38, 2] and not stand_in.calls
        assert "--test_file" in refusal(lambda task=task, files=files: load_split(task, "test", files=files, seed=0))


def _hub_id(task: str) -> str:
    return IDS[task][0] if task in IDS else "IWSLT/iwslt2017"


def test_an_evaluation_s_split_has_a_seed_of_its_own(tmp_path: Path) -> None:
    """So samples of several seeds are of the same validation rows."""
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": f"p{n}", "completion": "c"} for n in range(60)])

    def prompts(**seeds: int) -> list[str]:
        settings = parse_settings([f"--train_file={file}", "--split=validation"], EvaluateSettings)
        return [one.prompt for one in read_split(settings.model_copy(update=seeds), "validation", tokenizer=None)]

    assert prompts(seed=5, split_seed=1234) == prompts(seed=1234) != prompts(seed=5)
