"""Scores by decoding in a training run: before and after it, and as what chooses the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import ROOT
from support.run_files import losses, metrics, status
from support.run_helpers import Base, run, write_base

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, generate
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.training.finish import score_rows

pytestmark = pytest.mark.distributed

JUDGED: dict[str, Any] = {"eval_metric": "exact_match", "eval_samples": 17, "eval_interval": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Every answer is "x", which the tiny model learns late for some of the prompts."""
    base = write_base(tmp_path_factory.mktemp("base"))
    rows = [{"prompt": f"say {index} {letter}", "completion": "x"} for index, letter in enumerate(LETTERS)]
    base.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base


LETTERS = "abcdefghijklmnopqrstuvwx"


def start(base: Base, folder: Path, ranks: int = 1, **changes: Any) -> Path:
    """A run that scores the training rows."""
    rows = {"validation_file": base.train, "test_file": base.train, "max_new_tokens": 8}
    run(base, folder, ranks=ranks, **{**rows, "learning_rate": 5e-2, "max_steps": 16, "rank": 8, **changes})
    return folder


@pytest.fixture(scope="module")
def judged(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is judged by its metric on some of the validation rows; test_adapters_evaluated.py has layouts."""
    return start(base, tmp_path_factory.mktemp("judged") / "run", ds_config="zero1.json", **JUDGED)


def test_the_metric_chooses_the_best_checkpoint(judged: Path) -> None:
    """The first step with the highest score, although the loss went on falling."""
    rows = metrics(judged, "validation")
    by_loss = min(rows, key=lambda row: row["loss"])["step"]
    by_metric = max(rows, key=lambda row: (row["exact_match"], -row["step"]))["step"]
    assert 0 < by_metric < by_loss
    folders = [judged / "adapter", *(judged / "checkpoints" / f"step_{step}" for step in (by_metric, by_loss))]
    best, kept, last = (load_native_adapter(folder).state for folder in folders)
    assert all((best[name] == kept[name]).all() for name in best)
    assert any((best[name] != last[name]).any() for name in best)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "layout"), [(4, {"tensor_parallel": 2}), (2, {"pipeline_parallel": 2})], ids=["tp2_dp2", "pp2"]
)
def test_scores_do_not_depend_on_the_layout(
    base: Base, judged: Path, folder: Path, ranks: int, layout: dict[str, int]
) -> None:
    here = start(base, folder, ranks, ds_config="zero1.json", **JUDGED, **layout)
    found, alone = ([(row["step"], row["exact_match"]) for row in metrics(run, "validation")] for run in (here, judged))
    assert found == alone
    assert json.loads((here / "scores.json").read_text()) == json.loads((judged / "scores.json").read_text())


def test_validation_samples_are_as_many_as_asked_for_and_test_samples_all(judged: Path) -> None:
    scores = json.loads((judged / "scores.json").read_text())
    assert scores["before"]["exact_match"]["n"] == scores["after"]["exact_match"]["n"] == len(LETTERS)
    assert scores["before"]["exact_match"]["score"] == 0 < scores["after"]["exact_match"]["score"] < 100
    shares = {row["exact_match"] for row in metrics(judged, "validation")}
    assert all(share * 17 % 100 == pytest.approx(0, abs=1e-9) for share in shares) and len(shares) > 1


def test_ranks_of_zero_3_call_the_model_until_all_are_done(
    base: Base, judged: Path, tmp_path: Path, folder: Path
) -> None:
    """One of the first two rows is ended at once by the trained model, and the others' prompts differ much in length:
    each rank calls as often as the other all the same, or one would wait. Every weight is gathered in each call."""
    adapter, source = load_native_adapter(judged / "adapter"), find_model(str(base.model))
    tokenizer = load_tokenizer(base.model)
    decoder = Decoder(load_model(source, adapter, dtype=torch.float32), ParallelGroups(), source.shape)
    rows = [json.loads(line) for line in base.train.read_text().splitlines()]
    encoded, _ = encode_prompts(tokenizer, [Example(row["prompt"], "", "here") for row in rows], max_length=60)
    prompts = [ids.tolist() for ids in encoded]
    (rows_of_ids,) = generate(decoder, [Prompts(prompts, [RowSettings((tokenizer.eos_token_id,), 8)] * len(prompts))])
    lengths = [len(ids) for ids in rows_of_ids]
    chosen = [rows[lengths.index(min(lengths))], rows[lengths.index(8)]]
    assert min(lengths) < 8
    chosen += [{"prompt": "say " + "long " * 8, "completion": "x"}, {"prompt": "say it all", "completion": "x"}]
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    # The trained run at its end: nothing is left to do but to score.
    resumed = {**JUDGED, "resume": judged / "checkpoints" / "step_16"}
    start(base, folder, 2, ds_config=tmp_path / "zero3.json", test_file=tmp_path / "test.jsonl", **resumed)
    assert json.loads((folder / "scores.json").read_text())["after"]["exact_match"]["n"] == 4


def test_scores_of_another_test_set_stand_in_a_row_of_their_own(base: Base, tmp_path: Path, folder: Path) -> None:
    """A run is resumed with other test samples: what it scored before was of the first ones."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(base.train.read_text().splitlines(keepends=True)[:5]))
    settings = {"max_steps": 2, "max_new_tokens": 8}
    run(base, folder, test_file=base.validation, **settings)
    # The run is at its end: nothing is left to do but to score.
    printed = run(base, folder, test_file=other, resume="auto", **settings).outputs[0].splitlines()
    scores = json.loads((folder / "scores.json").read_text())
    first, second = (scores[moment]["exact_match"] for moment in ("before", "after"))
    assert (first["n"], second["n"]) == (6, 5) and len(first["samples_sha256"]) == 64
    assert first["samples_sha256"] != second["samples_sha256"]
    rows = [line.split() for line in printed if line.startswith("exact_match, ")]
    assert rows == [
        ["exact_match,", "6", "test", "samples", f"{first['score']:.1f}", "%", "-"],
        ["exact_match,", "5", "test", "samples", "-", f"{second['score']:.1f}", "%"],
    ]


def test_which_scores_share_a_row() -> None:
    """Those of the same samples; and of an older version, which kept no hash, those of its own."""

    def rows(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
        entries = {"before": before, "after": after}
        found = {moment: {"n": 3, "score": 50.0, **entry} for moment, entry in entries.items() if entry is not None}
        return [" ".join(row) for row in score_rows({moment: {"bleu": found[moment]} for moment in found})]

    one, other = {"samples_sha256": "1"}, {"samples_sha256": "2"}
    together = ["bleu, 3 test samples 50.0 % 50.0 %"]
    apart = ["bleu, 3 test samples 50.0 % -", "bleu, 3 test samples - 50.0 %"]
    assert rows(one, one) == rows({}, {}) == together
    assert rows(one, other) == rows({}, one) == rows(one, {}) == apart
    assert rows(one, None) == apart[:1] and rows(None, one) == apart[1:] and rows(None, None) == []


def test_patience_counts_evaluations_of_the_metric(base: Base, folder: Path) -> None:
    """The score stays at 0 while the loss falls: two evaluations after the first one the run ends."""
    start(base, folder, eval_metric="exact_match", patience=2, test_file=None)
    assert status(folder) == {"state": "finished", "step": 6, "reason": "early_stopping"}
    found = [loss for _, loss in losses(folder, "validation")]
    assert found == sorted(found, reverse=True)
