"""launch/evaluate.py --adapters: each adapter has the files of an evaluation of its own, from one load of the base."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.evaluation_runs import FILES, begin, evaluate, results, texts
from support.native_files import with_adapter, write_native
from support.run_helpers import Ended, write_rows
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.evaluation.plan import plan_evaluations

pytestmark = pytest.mark.distributed

_ROWS = 7  # two ranks share them unevenly


@dataclass(frozen=True)
class Many:
    """Three adapters of one base, in a folder of runs, as a PEFT folder and as a native one; and an evaluation of each.

    Attributes:
        alone: the folder of each one's own evaluation, by name.
    """

    folder: Path
    base: Path
    runs: Path
    peft: Path
    native: Path
    rows: Path
    alone: dict[str, Path]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Many:
    folder = tmp_path_factory.mktemp("many")
    base, runs, rows = write_tiny_model(folder / "model"), folder / "runs", write_rows(folder / "rows.jsonl", _ROWS)
    kinds: dict[str, dict[str, Any]] = {
        "a": {"method": "tl6", "layers": (1, 3), "seed": 3},
        "b": {"method": "lora", "rank": 2, "seed": 4},
        "c": {"method": "vera", "rank": 8, "seed": 5},
    }
    for name, own in kinds.items():
        source, adapter, oracle = with_adapter(base, own.pop("method"), **own)
        write_native(runs / name / "adapter", base, oracle)
        if name == "b":
            export_peft(source, adapter, folder / "peft")
    (runs / "logs").mkdir()
    many = Many(folder, base, runs, folder / "peft", runs / "c" / "adapter", rows, {})
    for name in kinds:
        evaluate_many(many, folder / name, adapter=runs / name / "adapter")
        many.alone[name] = folder / name
    assert len({str(texts(own)) for own in many.alone.values()}) == 3
    return many


def _same(found: Path, expected: Path, *, but: tuple[str, ...] = ()) -> None:
    assert {item.name for item in found.iterdir()} == FILES
    assert (found / "predictions.jsonl").read_bytes() == (expected / "predictions.jsonl").read_bytes()
    contents = []
    for folder in (found, expected):
        content = results(folder)
        content["settings"]["output_dir"] = None
        contents.append({key: value for key, value in content.items() if key not in but})
    assert contents[0] == contents[1]


def evaluate_many(many: Many, folder: Path, *adapters: Any, **settings: Any) -> Ended:
    settings = {"test_file": many.rows, "max_new_tokens": 12, "batch_size": 3, **settings}
    return evaluate(folder, work=folder.parent / "work", adapters=adapters, **settings)


def test_a_folder_of_runs(many: Many, tmp_path: Path) -> None:
    ended = evaluate_many(many, tmp_path / "out", many.runs)
    assert {item.name for item in (tmp_path / "out").iterdir()} == {"a", "b", "c", "table.csv"}
    for name, expected in many.alone.items():
        _same(tmp_path / "out" / name, expected)
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["kind"], row["n"]) for row in rows] == [
        ("a", "tl6-r4", "7"),
        ("b", "lora-r2", "7"),
        ("c", "vera-r8", "7"),
    ]
    for row in rows:
        score = results(many.alone[row["name"]])["scores"]["exact_match"]
        numbers = [float(row[column]) for column in ("exact_match", "exact_match_low", "exact_match_high")]
        assert numbers == [score["score"], *score["confidence_interval"]]
    assert "with 3 adapters" in ended.outputs[0] and "adapter    b: lora-r2, from " in ended.outputs[0]
    assert ended.outputs[0].count("\n  b  ") == 1


def test_names_patterns_and_forms(many: Many, tmp_path: Path) -> None:
    """NAME=FOLDER as vLLM takes it; a run, a pattern, a PEFT folder; the same adapter under two names."""
    given = [f"mine={many.peft}", str(many.runs / "a"), f"{many.runs}/[c]/adapter", f"again={many.runs / 'a'}"]
    evaluate_many(many, tmp_path / "out", *given)
    out = tmp_path / "out"
    assert {item.name for item in out.iterdir()} == {"mine", "a", "c", "again", "table.csv"}
    for name in ("a", "c"):
        _same(out / name, many.alone[name])
    _same(out / "again", many.alone["a"])
    assert texts(out / "mine") == texts(many.alone["b"]) and results(out / "mine")["model_kind"] == "peft"


@pytest.mark.parametrize("layout", [{"pipeline_parallel": 2}, {"tensor_parallel": 2}, {}])
def test_two_ranks(many: Many, tmp_path: Path, layout: dict[str, int]) -> None:
    evaluate_many(many, tmp_path / "out", many.runs, ranks=2, **layout)
    for name, expected in many.alone.items():
        _same(tmp_path / "out" / name, expected, but=("settings", "ranks", "layout"))


@pytest.fixture(scope="module")
def other(many: Many) -> Path:
    """An adapter of another base."""
    base = write_tiny_model(many.folder / "other_model", seed=9)
    write_native(many.folder / "other" / "adapter", base, with_adapter(base, "tl6")[2])
    return many.folder / "other"


def _broken(many: Many, folder: Path) -> Path:
    shutil.copytree(many.native, folder / "broken" / "adapter")
    (folder / "broken" / "adapter" / "adapter_model.safetensors").write_bytes(b"no tensors")
    return folder / "broken"


def test_bad_inputs_are_said_before_the_base_is_loaded(many: Many, other: Path, tmp_path: Path) -> None:
    """One line, and nothing is written."""
    shutil.copytree(many.runs / "a", tmp_path / "copies" / "a")
    (tmp_path / "empty").mkdir()
    a = str(many.runs / "a")
    for given, message, settings in (
        ([a, str(_broken(many, tmp_path))], "--adapters: broken: ", {}),
        ([a, str(other)], "--adapters: other: its base is ", {}),
        ([a, str(other)], "--adapters: other: ", {"model": many.base}),
        ([a, str(tmp_path / "copies")], "are both named a; rename with NAME=FOLDER", {}),
        ([a, "nowhere"], "--adapters: nowhere: --adapter nowhere: no such folder", {}),
        ([a, str(tmp_path / "empty")], "--adapters: empty: ", {}),
        ([f"x={many.runs}"], f"{many.runs} has 3 adapters; give NAME=FOLDER for each", {}),
        ([f"../x={a}", a], "--adapters", {}),
        ([f"{tmp_path}/no*"], "matches no folder of an adapter", {}),
        ([a], "give either --adapter or --adapters", {"adapter": a}),
        ([a], "--merge_adapter needs --adapter", {"merge_adapter": "true"}),
    ):
        chosen = {"test_file": many.rows, "output_dir": tmp_path / "out", "adapters": given, **settings}
        assert message in refusal(lambda: begin(chosen)), given  # noqa: B023
        assert not (tmp_path / "out").exists()


def test_a_yaml_file(many: Many, tmp_path: Path) -> None:
    """The flag's words are a list there; one text is one adapter."""
    file = tmp_path / "set.yaml"
    for given in ([str(many.runs / "a")], str(many.runs / "a")):
        file.write_text(json.dumps({"adapters": given, "test_file": str(many.rows)}))
        settings = parse_settings([f"--config={file}"], EvaluateSettings)
        assert list(plan_evaluations(settings, rank=0, world_size=1)) == ["a"]
