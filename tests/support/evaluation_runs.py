"""Starts launch/evaluate.py on tiny models and reads what it has left; scores computed anew from predictions.jsonl."""

from __future__ import annotations

import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.evaluation.answering import Answerer, answer_all, read_scored
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.evaluation.plan import plan_evaluations
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups
from support.run_helpers import EVALUATE, Ended, run_ranks
from support.task_files import write_rows

FILES = {"predictions.jsonl", "results.json"}


def evaluate(
    folder: Path, *, work: Path, expect: int = 0, ranks: int | None = None, prelude: Any = None, **settings: Any
) -> Ended:
    """One evaluation into `folder`, started in `work`, which must end with status `expect` on every rank. An adapter's
    folder has its two files then, and where the evaluation has failed there is nothing."""
    words = settings.pop("adapters", ())
    settings = {"output_dir": folder, "dtype": "fp32", **settings}
    arguments = [f"--{name}={str(value).lower() if value is True else value}" for name, value in settings.items()]
    arguments += ["--adapters", *map(str, words)] if words else []
    ended = run_ranks(arguments, folder=work, ranks=ranks, prelude=prelude, script=EVALUATE).expect(expect)
    if expect:
        assert not folder.exists() and not list(folder.parent.glob(".writing*"))
    elif not words:
        assert {item.name for item in folder.iterdir()} == FILES
    return ended


def begin(settings: Mapping[str, Any], *, ranks: int = 1) -> None:
    """Rank 0's start of an evaluation in this process, until it would load the model; then it gives its folder back.
    It takes the steps of commands/evaluate.py, without a process group."""
    from megatron_tiedlora.commands.evaluate import take_results_folder
    from megatron_tiedlora.config.cli import parse_settings
    from megatron_tiedlora.data.splits import check_files_exist

    words = [f"--{name}={value}" for name, value in settings.items() if value is not None and name != "adapters"]
    if adapters := settings.get("adapters"):
        words += ["--adapters", *map(str, adapters)]
    made = parse_settings(words, EvaluateSettings)
    check_files_exist(made)
    plans = plan_evaluations(made, rank=0, world_size=ranks)
    with ExitStack() as held:
        end: Any = SimpleNamespace(rank=0, held=held, owners=[])
        take_results_folder(made, plans, read_scored(plans), end)


WORDS = ("abc", "de fg", "hij", "k lm no", "pq", "r", "stu vwx", "yz", "0 1 2", "345")
PROMPTS = [f"{WORDS[i % 10]} {WORDS[(3 * i + 1) % 10] * (1 + i % 3)}?" for i in range(8)]
ENDINGS = ("ab", "c d e f", "ghij klm", "nopqrs")


def write_tasks(folder: Path) -> dict[str, dict[str, str]]:
    """Settings of a task without a stop text, and of one that has it and scores choices, on rows that are written."""
    plain: list[dict[str, Any]] = [{"prompt": text, "completion": "x"} for text in PROMPTS]
    choices: list[dict[str, Any]] = [
        {"activity_label": "a", "ctx_a": text, "ctx_b": "", "endings": ENDINGS[: 2 + i % 3], "label": "0"}
        for i, text in enumerate(PROMPTS)
    ]
    rows = {"custom": plain, "hellaswag": choices}
    return {name: {"task": name, "test_file": write_rows(folder / f"{name}.jsonl", rows[name])} for name in rows}


def answers_of(engine: Any = None, **settings: Any) -> dict[str, list[Answer]]:
    """The answers in this process, from this package's decoder, one adapter after the other, or from `engine`'s class.
    Settings are a task's, in fp32 with answers of up to 40 tokens, which are several rounds of vLLM."""
    own = {"dtype": "fp32", "max_new_tokens": 40, "engine": "vllm" if engine else "own"}
    plans = plan_evaluations(EvaluateSettings(**{**own, **settings}), rank=0, world_size=1)
    scored, found = read_scored(plans), {}
    if engine:
        with closing(engine(plans, scored)) as answerer:
            sampling = next(iter(plans.values())).sampling
            return answer_all(answerer, scored, grid=Grid(0, 1), sampling=sampling)
    for name, plan in plans.items():
        stage = load_model(plan.source, plan.adapter, dtype=torch.float32)
        answerer = Answerer(Decoder(stage, ParallelGroups(), plan.source.shape))
        found[name] = answer_all(answerer, {"": scored[name]}, grid=Grid(0, 1))[""]
    return found


def assert_same_answers(
    found: Mapping[str, list[Answer]], expected: Mapping[str, list[Answer]], *, near: float = 1e-3
) -> None:
    """Samples and texts are equal, and log-likelihoods nearly."""
    assert found.keys() == expected.keys()
    for name, answers in expected.items():
        for ours, theirs in zip(found[name], answers, strict=True):
            assert (ours.example, ours.prediction) == (theirs.example, theirs.prediction), name
            assert ours.choice_scores == pytest.approx(theirs.choice_scores, abs=near), name


def predictions(folder: Path) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl, as a user would read them."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def results(folder: Path) -> dict[str, Any]:
    """results.json."""
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def texts(folder: Path) -> list[str]:
    """What was predicted, in the order of the file."""
    return [row["prediction"] for row in predictions(folder)]


def score_again(task: str, row: dict[str, Any]) -> dict[str, float]:
    """The scores of one line of predictions.jsonl by the task's own definition, in per cent; shares no code."""
    found, wanted = row["prediction"], row["references"]
    if task == "custom":
        return {"exact_match": 100.0 * (found in wanted)}
    if task == "gsm8k":
        numbers = [re.findall(r"#### (-?[0-9.,]+)", text) for text in (found, wanted[0])]
        first = [some[0].replace(",", "") if some else None for some in numbers]
        return {"gsm8k": 100.0 * (first[0] is not None and first[0] == first[1])}
    assert task == "squad"

    def words(text: str) -> list[str]:
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    def f1(one: list[str], other: list[str]) -> float:
        common = sum((Counter(one) & Counter(other)).values())
        if not common:
            return 0.0
        precision, recall = common / len(one), common / len(other)
        return 2 * precision * recall / (precision + recall)

    mine = words(found)
    return {
        "squad": 100.0 * any(mine == words(text) for text in wanted),
        "squad_f1": 100.0 * max(f1(mine, words(text)) for text in wanted),
    }


def answering_model(folder: Path, answer: str) -> Path:
    """Change the tiny model in `folder` so that it continues `...:` with `answer` and the end, whatever came before.

    The answer becomes one token. Attention and feed-forward add next to nothing to a token's embedding, from which the
    head reads what comes next.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    colon = tokenizer.encode(":", add_special_tokens=False)[0]
    tokenizer.add_tokens([answer])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chain = (colon, tokenizer.convert_tokens_to_ids(answer), tokenizer.eos_token_id)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 1e-3
            layer.mlp.down_proj.weight *= 1e-3
        embedding, norm = model.model.embed_tokens.weight, model.model.norm.weight
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following] = 6 * torch.nn.functional.normalize(embedding[token] * norm, dim=0)
    model.save_pretrained(folder)
    return folder
