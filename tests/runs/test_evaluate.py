"""launch/evaluate.py: what it decodes with every kind of model and in every layout, what it writes, and how it ends."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.evaluation_runs import begin, evaluate, predictions, results, score_again, texts
from support.native_files import with_adapter, write_native
from support.oracle import OracleConfig
from support.run_helpers import EVALUATE, run_ranks, write_rows
from support.run_preludes import before_call, kill_at_call, limit_files
from support.task_files import refusal
from support.tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.evaluation.results import _json_line, prediction_row

pytestmark = pytest.mark.distributed

NEW_TOKENS = 12
FOLDED = "the adapter is folded"
NUM_ROWS = 7  # two ranks share them unevenly


@dataclass(frozen=True)
class Models:
    """A base with one adapter in each of its forms, and rows to decode.

    Attributes:
        expected: transformers' greedy answers of the merged model, by row.
    """

    folder: Path
    base: Path
    native: Path
    merged: Path
    peft: Path
    rows: Path
    expected: list[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("evaluate")
    base = write_tiny_model(folder / "model")
    source, adapter, oracle = with_adapter(base, "tl6", layers=(1, 3), seed=3)
    write_native(folder / "native", base, oracle)
    merge_adapter(source, adapter, folder / "merged")
    export_peft(source, adapter, folder / "peft")
    rows = write_rows(folder / "rows.jsonl", NUM_ROWS)
    expected = greedy_by_transformers(folder / "merged", rows)
    # Every other row is one that the adapted model gets right, so that no score is 0 or 100.
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for index in range(0, NUM_ROWS, 2):
        lines[index]["completion"] = expected[index]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert all(expected), "an empty prediction"
    return Models(folder, base, folder / "native", folder / "merged", folder / "peft", rows, expected)


def greedy_by_transformers(model_folder: Path, rows: Path) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for line in rows.read_text().splitlines():
        prompt = tokenizer(json.loads(line)["prompt"], return_tensors="pt")["input_ids"]
        output = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    return found


def run_of(models: Models, folder: Path, **settings: Any) -> Any:
    settings = {"test_file": models.rows, "max_new_tokens": NEW_TOKENS, "batch_size": 3, **settings}
    return evaluate(folder, work=folder.parent / "work", **settings)


@pytest.fixture(scope="module")
def alone(models: Models) -> Path:
    """The native adapter, decoded by one rank."""
    folder = models.folder / "alone"
    run_of(models, folder, adapter=models.native)
    return folder


def say_when_folded() -> None:
    """Print a line when the adapter is added to the weights: the answers do not tell."""
    before_call("megatron_tiedlora.checkpoint.load_model", "merged_rows", lambda *_: print(FOLDED))


def test_every_form_of_an_adapter_answers_alike(models: Models, alone: Path, tmp_path: Path) -> None:
    forms = {
        "folded": {"adapter": models.native, "merge_adapter": True},
        "merged": {"model": models.merged},
        "peft": {"adapter": models.peft},
        "based": {"adapter": models.native, "model": models.base, "batch_size": 16},
    }
    assert texts(alone) == models.expected
    for name, settings in forms.items():
        ended = run_of(models, tmp_path / name, prelude=say_when_folded, **settings)
        assert texts(tmp_path / name) == models.expected, name
        assert (FOLDED in ended.outputs[0]) == (name == "folded")
        assert "\nattention  tiles of queries (a CPU)\n" in ended.outputs[0]
    kinds = {name: results(tmp_path / name)["model_kind"] for name in forms}
    assert kinds == {"folded": "native", "merged": "merged", "peft": "peft", "based": "native"}

    run_of(models, tmp_path / "base", model=models.base)
    differing = [one != other for one, other in zip(texts(tmp_path / "base"), models.expected, strict=True)]
    assert sum(differing) > NUM_ROWS // 2, "the adapter changes nothing"
    assert results(tmp_path / "base")["score"] < results(alone)["score"]
    assert results(tmp_path / "base")["adapter"] is None and results(tmp_path / "base")["model_kind"] == "base"


def count_prompts() -> None:
    """Print how many prompts each batch of the rank has."""
    before_call(
        "megatron_tiedlora.evaluation.generate",
        "generate",
        lambda _, asked: print(f"prompts: {len(asked[0].prompts)}", file=sys.stderr),
    )


@pytest.mark.parametrize("layout", [{"tensor_parallel": 2}, {}], ids=["tp2", "dp2"])
def test_layouts_answer_as_one_rank_does(models: Models, alone: Path, layout: dict[str, int], tmp_path: Path) -> None:
    ended = run_of(models, tmp_path / "two", adapter=models.native, ranks=2, prelude=count_prompts, **layout)
    assert (tmp_path / "two/predictions.jsonl").read_bytes() == (alone / "predictions.jsonl").read_bytes()
    found, single = results(tmp_path / "two"), results(alone)
    assert found["scores"] == single["scores"]
    assert math.prod(found["layout"].values()) == found["ranks"] == 2
    assert found["layout"] | layout == found["layout"]
    assert "exact_match" in ended.outputs[0] and not ended.outputs[1]
    decoded = [sum(map(int, re.findall(r"prompts: (\d+)", text))) for text in ended.errors]
    # Two ranks share 7 rows as 3 and 3, then 1; the second decodes one again meanwhile, which does not count.
    assert decoded == ([NUM_ROWS, NUM_ROWS] if layout else [4, 4])


@pytest.mark.parametrize("layout", [{"tensor_parallel": 2}, {}], ids=["tp2", "dp2"])
def test_sampled_answers_are_those_of_one_rank(models: Models, layout: dict[str, int], tmp_path: Path) -> None:
    """Whatever else the ranks and their batches are; and the results say how they were sampled."""
    how = {"adapter": models.native, "temperature": 0.7, "top_p": 0.95, "seed": 5}
    run_of(models, tmp_path / "one", **how)
    ended = run_of(models, tmp_path / "two", **how, ranks=2, batch_size=2, **layout)
    assert "\ndecoding   sampled at temperature 0.7 and top_p 0.95, seed 5, at most 12 tokens" in ended.outputs[0]
    assert texts(tmp_path / "one") == texts(tmp_path / "two")
    assert sum(one != two for one, two in zip(texts(tmp_path / "one"), models.expected, strict=True)) > 3
    found = results(tmp_path / "two")
    assert {"temperature": 0.7, "top_p": 0.95, "seed": 5}.items() <= found["settings"].items()
    assert found["signature"].endswith("; sampled at temperature 0.7 and top_p 0.95, seed 5")


def test_what_is_written(models: Models, alone: Path) -> None:
    rows, found = predictions(alone), results(alone)
    lines = [json.loads(line) for line in models.rows.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [line["prompt"] for line in lines]
    assert [row["references"] for row in rows] == [[line["completion"].strip()] for line in lines]
    assert [set(row) for row in rows] == [{"prompt", "prediction", "references", "score"}] * NUM_ROWS
    again = [score_again("custom", row)["exact_match"] for row in rows]
    assert [row["score"] for row in rows] == again
    assert found["score"] == pytest.approx(sum(again) / NUM_ROWS) == pytest.approx(100 * 4 / 7)
    assert found["scores"]["exact_match"]["score"] == found["score"]
    assert (found["task"], found["metric"], found["n"]) == ("custom", "exact_match", NUM_ROWS)
    low, high = found["confidence_interval"]
    assert 0 <= low < found["score"] < high <= 100 and "sampled" not in found["signature"]
    assert set(found["settings"]) == set(EvaluateSettings.model_fields)
    resolved = {"model": str(models.base), "max_length": 256, "max_new_tokens": NEW_TOKENS, "task": "custom"}
    assert found["settings"] | resolved == found["settings"]
    adapter = {"method": "tl6", "rank": 4, "alpha": 6.0, "layers": [1, 3], "targets": ["qkv"], "merged": False}
    assert found["adapter"] == adapter
    assert {"torch", "transformers", "megatron_tiedlora"} <= set(found["versions"])


def test_default_folders_are_numbered_and_limit_takes_the_first_rows(models: Models, tmp_path: Path) -> None:
    arguments = [f"--adapter={models.native}", f"--test_file={models.rows}", "--max_new_tokens=2", "--dtype=fp32"]
    for _ in range(2):
        ended = run_ranks([*arguments, "--limit=3"], folder=tmp_path, script=EVALUATE).expect(0)
    folders = sorted((tmp_path / "evaluations").iterdir())
    assert [folder.name for folder in folders] == ["model-custom-tl6-r4", "model-custom-tl6-r4-2"]
    assert [row["prompt"] for row in predictions(folders[1])] == [
        json.loads(line)["prompt"] for line in models.rows.read_text().splitlines()[:3]
    ]
    assert str(Path("evaluations/model-custom-tl6-r4-2/results.json")) in ended.outputs[0]


def test_validation_split_is_the_one_that_a_run_carves(models: Models, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", 60, seed=4)
    chosen = {"task": "custom", "split": "validation", "train_file": train, "seed": 77, "max_new_tokens": 1}
    evaluate(tmp_path / "found", work=tmp_path, model=models.base, **chosen)
    carved = load_split("custom", "validation", files={"train": str(train)}, seed=77)
    assert [row["prompt"] for row in predictions(tmp_path / "found")] == [example.prompt for example in carved]
    assert 0 < len(carved) < 60


def test_choices_are_scored_by_their_likelihoods(models: Models, tmp_path: Path) -> None:
    draw = random.Random(1)
    words = [["ab", "a longer ending", "xyz zyx", "to be or not"][: 4 - number % 2] for number in range(9)]
    rows = [
        {"ind": i, "activity_label": "Sport", "ctx_a": "abc" * (i % 3 + 1), "ctx_b": "he", "endings": endings}
        | {"label": str(draw.randrange(len(endings)))}
        for i, endings in enumerate(words)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {"task": "hellaswag", "test_file": file, "adapter": models.native, "max_new_tokens": 3}
    for name, layout in (("one", {}), ("two", {"ranks": 2, "pipeline_parallel": 2})):
        evaluate(tmp_path / name, work=tmp_path, **chosen, **layout)
    assert texts(tmp_path / "one") == texts(tmp_path / "two")
    found = predictions(tmp_path / "one")
    right = []
    for row, asked, other in zip(found, rows, predictions(tmp_path / "two"), strict=True):
        assert row["choices"] == asked["endings"] and row["references"] == [asked["endings"][int(asked["label"])]]
        assert row["choice_scores"] == pytest.approx(other["choice_scores"], rel=1e-5)
        assert len(row["choice_scores"]) == len(row["choices"])
        per_letter = [score / len(text) for score, text in zip(row["choice_scores"], row["choices"], strict=True)]
        right.append(100.0 * (per_letter.index(max(per_letter)) == int(asked["label"])))
    assert [row["accuracy_loglikelihood"] for row in found] == right and 0 < sum(right) < 100 * len(right)
    scores = results(tmp_path / "one")["scores"]
    assert list(scores) == ["accuracy", "accuracy_loglikelihood"]
    assert scores["accuracy_loglikelihood"]["score"] == pytest.approx(sum(right) / len(right))


def test_a_line_is_a_line_for_every_reader() -> None:
    text = "a\u2028b\x85c\u2029d\x1ee\nf ü"
    row = prediction_row(Answer(text, Example("p", " " + text, "here")), ("exact_match",))
    line = _json_line(row)
    assert line.splitlines() == [line[:-1]] and "ü" in line
    assert json.loads(line)["prediction"] == text


def see_fewer_rows() -> None:
    """Rank 1 reads a file that is not as long as the others'."""
    if os.environ["RANK"] == "1":
        sys.argv.append("--limit=6")


def test_ranks_that_read_other_rows_are_refused(models: Models, tmp_path: Path) -> None:
    ended = run_of(models, tmp_path / "out", model=models.base, ranks=2, prelude=see_fewer_rows, expect=2)
    assert "1 rank read different rows from rank 0" in ended.error_line()


# How it ends --------------------------------------------------------------------------------------------------------


def stop_at_call(number: int, rank: str) -> None:
    """Rank `rank` is told to stop before the second batch; the others are not."""
    if os.environ["RANK"] == rank:
        kill_at_call("megatron_tiedlora.evaluation.generate", "generate", call=2, number=number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_rank_stops_all_and_nothing_is_written(
    number: int, status: int, models: Models, tmp_path: Path
) -> None:
    chosen = {"adapter": models.native, "batch_size": 1, "prelude": functools.partial(stop_at_call, number, "1")}
    ended = run_of(models, tmp_path / "out", ranks=2, expect=status, **chosen)
    assert "nothing was written" in ended.errors[0] and "Traceback" not in "".join(ended.errors)


def test_a_signal_before_decoding_stops_at_once(models: Models, tmp_path: Path) -> None:
    prelude = functools.partial(
        kill_at_call, "megatron_tiedlora.checkpoint.load_model", "load_base_weights", number=signal.SIGTERM
    )
    run_of(models, tmp_path / "out", model=models.base, prelude=prelude, expect=143)


def test_a_full_disk_leaves_nothing(models: Models, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "many.jsonl", 200)
    prelude = functools.partial(limit_files, "megatron_tiedlora.evaluation.results", "write_results", 8192)
    chosen = {"model": models.base, "test_file": rows, "max_new_tokens": 1}
    assert "cannot be written" in run_of(models, tmp_path / "out", prelude=prelude, expect=2, **chosen).error_line()


# Bad input ----------------------------------------------------------------------------------------------------------


def _other_base(models: Models, folder: Path) -> dict[str, Any]:
    other = write_tiny_model(folder / "other", seed=9)
    return {"adapter": models.native, "model": other}


def _occupied(models: Models, folder: Path) -> dict[str, Any]:
    (folder / "full").mkdir()
    (folder / "full/notes.txt").write_text("mine")
    return {"model": models.base, "output_dir": folder / "full"}


def _run_folder(models: Models, folder: Path) -> dict[str, Any]:
    oracle = random_adapter("tl6", OracleConfig.from_folder(models.base))
    write_native(folder / "run/adapter", models.base, oracle)
    return {"adapter": folder / "run"}


def _rows(*rows: dict[str, Any], task: str) -> Callable[[Models, Path], dict[str, Any]]:
    def prepare(models: Models, folder: Path) -> dict[str, Any]:
        (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"model": models.base, "task": task, "test_file": folder / "bad.jsonl"}

    return prepare


def _given(**settings: Any) -> Callable[[Models, Path], dict[str, Any]]:
    return lambda models, _: {"model": models.base, **settings}


BAD: dict[str, tuple[int, Callable[[Models, Path], dict[str, Any]], list[str]]] = {
    "other_base": (1, _other_base, ["--adapter", "whose weights differ", "give its own base with --model"]),
    "merged_twice": (
        1,
        lambda m, _: {"adapter": m.native, "model": m.merged},
        ["an adapter is already merged into it", "plain base"],
    ),
    "peft_on_merged": (
        1,
        lambda m, _: {"adapter": m.peft, "model": m.merged},
        ["an adapter is already merged into it", "plain base"],
    ),
    "run_folder": (1, _run_folder, ["this is a run folder", "run/adapter"]),
    "no_adapter": (1, _given(adapter="nowhere"), ["--adapter nowhere", "no such folder"]),
    "model_as_adapter": (1, lambda m, _: {"adapter": m.base}, ["this is a model folder", "--model"]),
    "shape": (1, _given(model="llama2-7b"), ["--model llama2-7b is a shape without weights"]),
    "occupied": (1, _occupied, ["--output_dir", "holds other files"]),
    "under_a_file": (
        1,
        lambda m, _: {"model": m.base, "output_dir": m.rows / "out"},
        ["--output_dir", "is a file; give a folder"],
    ),
    "long_answer": (1, _given(max_new_tokens=256), ["--max_new_tokens 256", "at most 256 tokens"]),
    "long_length": (1, _given(max_length=257), ["--max_length 257", "256 positions"]),
    "heads": (4, _given(tensor_parallel=4), ["--tensor_parallel 4", "Possible values: 1, 2"]),
    "stages": (4, _given(pipeline_parallel=4), ["--pipeline_parallel 4", "3 layers"]),
    "ranks": (1, _given(tensor_parallel=2), ["1 rank is not a multiple", "Start 2 ranks", "tiedlora evaluate"]),
    "no_test_rows": (1, _given(task="custom", test_file=None), ["has no test data", "--test_file"]),
    "no_file": (1, _given(test_file="nothing.jsonl"), ["nothing.jsonl"]),
    "field": (1, _rows({"question": "q"}, task="gsm8k"), ["bad.jsonl:1", "'answer'"]),
    "references": (
        1,
        _rows({"context": "c", "question": "q", "answers": {"text": []}}, task="squad"),
        ["bad.jsonl:1", "'answers'"],
    ),
    "no_labels": (
        1,
        _rows({"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c"], "label": ""}, task="hellaswag"),
        ["bad.jsonl:1", "'label'"],
    ),
    "template": (1, _given(prompt_template="{nothing}"), ["--prompt_template", "'nothing'"]),
    "cold": (1, _given(temperature=-1), ["--temperature -1: input should be greater than or equal to 0"]),
    "no_nucleus": (1, _given(temperature=1, top_p=0), ["--top_p 0: input should be greater than 0"]),
    "large_nucleus": (1, _given(temperature=1, top_p=1.5), ["--top_p 1.5: input should be less than or equal to 1"]),
    "greedy_nucleus": (1, _given(top_p=0.9), ["--top_p 0.9 needs --temperature above 0"]),
    "greedy_top_k": (1, _given(top_k=5), ["--top_k 5 needs --temperature above 0"]),
    "negative_top_k": (1, _given(temperature=1, top_k=-1), ["--top_k -1: input should be greater than or equal to 0"]),
}


def test_a_rank_that_is_refused_leaves_nothing(models: Models, tmp_path: Path) -> None:
    """By a row: what is refused in this process below, by the real script."""
    _, prepare, parts = BAD["field"]
    settings = {"test_file": models.rows, "output_dir": "out", **prepare(models, tmp_path)}
    work = tmp_path / "work"
    ended = run_ranks([f"--{key}={value}" for key, value in settings.items()], folder=work, script=EVALUATE).expect(2)
    line = ended.error_line()
    assert all(part in line for part in parts), line
    assert not (work / "out").exists() and not list(tmp_path.rglob(".writing*"))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(
    name: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ranks, prepare, parts = BAD[name]
    settings = {"test_file": models.rows, "output_dir": tmp_path / "out", **prepare(models, tmp_path)}
    line = refusal(lambda: begin(settings, ranks=ranks))
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists() and not (tmp_path / "evaluations").exists()
    if name == "occupied":
        assert [item.name for item in (tmp_path / "full").iterdir()] == ["notes.txt"]
