"""The recipes of `tinker_cookbook` against the training service, with the unmodified SDK: losses fall, rewards rise.

-s prints the metrics.

make test-tinker PYTEST_ARGS=-s TESTS=tests/slow/test_slow_recipes.py
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from support.folders import TESTS
from support.ranks import wait_for
from support.tiny_models import write_tiny_model
from support.training_service import Service

from megatron_tiedlora.checkpoint.sources import demo_model_path

PYTHON = os.environ.get("TINKER_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.tinker,
]
needs_demo = pytest.mark.skipif(not demo_model_path().is_dir(), reason="prepare the demo model first")
NAME = "meta-llama/demo"  # recipe_run.MODEL
SECONDS = 900.0  # that a recipe may take
# The renderers end a message with a token, and with a text.
DEMO, TINY = "qwen3_instruct", "role_colon"
TP2 = ["--tensor_parallel", "2"]


class Recipes:
    """A service in a folder, and recipes that it trains."""

    def __init__(self, folder: Path, base: Path, renderer: str, flags: Sequence[str] = ()) -> None:
        ranks = 2 if flags else None
        self.folder, self.renderer = folder, renderer
        self.service = Service(folder, base, ["--model_name", NAME, *flags], ranks=ranks)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(TESTS),
            "TINKER_API_KEY": self.service.key(),
            "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.service.start()

    def start(self, recipe: str, log: Path, *, method: str = "tl6", **settings: Any) -> subprocess.Popen[bytes]:
        """Start a recipe, which resumes if it has been started with the same folder."""
        settings |= {"base_url": self.service.url, "log_path": str(log), "model_name": f"{NAME}:{method}"}
        file = log.with_suffix(".json")
        file.write_text(
            json.dumps({"tokenizer": str(self.service.base), "renderer": self.renderer, "settings": settings})
        )
        with log.with_suffix(".txt").open("ab") as stream:
            command = [PYTHON, "-m", "support.recipe_run", recipe, str(file)]
            return subprocess.Popen(command, stdout=stream, stderr=stream, env=self._environment)

    def finish(self, process: subprocess.Popen[bytes], log: Path) -> list[dict[str, Any]]:
        """Wait for the end of a recipe, and return its metrics."""
        try:
            status = process.wait(SECONDS)
        finally:
            process.kill()
        assert status == 0, log.with_suffix(".txt").read_text()[-3000:]
        return metrics(log)

    def run(self, recipe: str, name: str, **settings: Any) -> list[dict[str, Any]]:
        """Run a recipe and return its metrics."""
        log, start = self.folder / name, time.monotonic()
        found = self.finish(self.start(recipe, log, **settings), log)
        print(f"\n{recipe} {name} {len(found)} steps, {time.monotonic() - start:.0f} s:", flush=True)
        return found


def metrics(log: Path) -> list[dict[str, Any]]:
    """The metrics that a recipe has written."""
    file = log / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The values of a metric, which are printed."""
    found = [row[name] for row in rows if name in row]
    print(f"    {name}: {' '.join(f'{value:.4g}' for value in found)}")
    return found


@pytest.fixture
def recipes(tmp_path: Path) -> Iterator[Callable[..., Recipes]]:
    """Starts services, which are killed at the end. The arguments are a renderer and flags."""
    started: list[Recipes] = []

    def start(renderer: str, flags: Sequence[str] = ()) -> Recipes:
        shape = {"hidden_size": 64, "intermediate_size": 96, "max_positions": 2048}
        base = demo_model_path() if renderer == DEMO else write_tiny_model(tmp_path / "tiny", **shape)
        started.append(Recipes(tmp_path / "service", base, renderer, flags))
        return started[-1]

    yield start
    for one in started:
        one.service.kill()


@needs_demo
@pytest.mark.parametrize("stopped", ["client", "service"])
def test_sl_loop_that_is_stopped_has_the_losses_of_one_that_is_not(
    recipes: Callable[..., Recipes], stopped: str
) -> None:
    found = recipes(DEMO)
    settings = dict[str, Any](batch_size=8, max_steps=10, lora_rank=8, learning_rate=2e-3, save_every=4)
    whole = found.run("sl_loop", "whole", **settings)
    losses = column(whole, "train_mean_nll")
    assert losses[0] > 2 and max(losses[-2:]) < 0.1, losses
    assert [row["step"] for row in whole] == list(range(10)), "a metric of the service hides the recipe's step"
    log = found.folder / "stopped"
    process = found.start("sl_loop", log, **settings)
    wait_for(lambda: len(metrics(log)) >= 6 or process.poll() is not None, "six steps", limit=SECONDS)
    if stopped == "client":
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        process = found.start("sl_loop", log, **settings)
    else:
        found.service.kill()
        found.service.start()
    resumed = found.finish(process, log)
    assert len(resumed) > len(whole) if stopped == "client" else len(resumed) == len(whole)
    by_step = {row["progress"]: row["train_mean_nll"] for row in resumed}
    assert list(by_step.values()) == losses


@pytest.mark.parametrize(
    ("loss", "method", "flags"),
    [("importance_sampling", "tl6", []), ("cispo", "lora", []), ("importance_sampling", "tl6", TP2)],
    ids=["importance_sampling", "cispo", "tp2"],
)
def test_rl_loop_earns_more(recipes: Callable[..., Recipes], loss: str, method: str, flags: list[str]) -> None:
    found = recipes(TINY, flags)
    settings = {"batch_size": 4, "group_size": 8, "max_tokens": 16, "max_steps": 20, "lora_rank": 8, "save_every": 8}
    rows = found.run("rl_loop", "rewards", loss_fn=loss, method=method, learning_rate=2e-2, **settings)
    rewards = column(rows, "reward/total")
    column(rows, "time/total")
    assert rewards[0] < 0.15 and fmean(rewards[-4:]) > 0.6, rewards


@needs_demo
def test_dpo_prefers_the_chosen_answers(recipes: Callable[..., Recipes]) -> None:
    rows = recipes(DEMO).run("dpo", "preferences", batch_size=4, max_steps=8, learning_rate=1e-3)
    losses, margins, right = (column(rows, name) for name in ("dpo_loss", "margin", "accuracy"))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and abs(margins[0]) < 1e-3, "the reference is the start"
    assert losses[-1] < 0.45 and margins[-1] > 0.5 and right[-1] == 1
    assert losses == sorted(losses, reverse=True) and margins == sorted(margins)


@needs_demo
def test_sl_basic_evaluates_what_it_trains(recipes: Callable[..., Recipes]) -> None:
    settings = {"batch_size": 8, "max_steps": 9, "learning_rate": 2e-3, "eval_every": 4}
    rows = recipes(DEMO).run("sl_basic", "evaluated", method="lora", **settings)
    losses, evaluated = column(rows, "train_mean_nll"), column(rows, "test/nll")
    assert losses[0] > 2 and losses[-1] < 0.1
    assert len(evaluated) == 3 and evaluated[0] > 2 and evaluated[-1] < 0.1


def test_rl_basic_has_the_base_as_its_reference_and_earns_more(recipes: Callable[..., Recipes]) -> None:
    """A penalty on the KL divergence from the base, evaluations, and checkpoints that are deleted again."""
    settings = dict[str, Any](batch_size=4, group_size=8, max_tokens=16, max_steps=16, lora_rank=8, learning_rate=2e-2)
    settings |= {"kl_penalty_coef": 0.01, "compute_post_kl": True, "eval_every": 8, "save_every": 6}
    rows = recipes(TINY).run("rl_basic", "rewards", rolling_save_every=2, **settings)
    rewards, tests = column(rows, "env/all/correct"), column(rows, "test/env/all/correct")
    drifts, sampled = column(rows, "kl_policy_base"), column(rows, "optim/kl_sample_train_v1")
    assert rewards[0] < 0.15 and fmean(rewards[-4:]) > 0.3, rewards
    assert len(tests) == 3 and tests[0] < 0.15 and tests[-1] > 0.2, tests
    assert abs(drifts[0]) < 1e-4 < 0.5 < drifts[-1], "the policy starts as the base, and leaves it"
    assert max(map(abs, sampled)) < 1e-4, "samples have the log-probabilities of training"


def test_recipes_at_the_same_time_have_the_losses_of_one_alone(recipes: Callable[..., Recipes]) -> None:
    found = recipes(TINY)
    settings = dict[str, Any](method="lora", batch_size=8, max_steps=12, lora_rank=8, learning_rate=1e-2, save_every=5)
    alone = column(found.run("sl_loop", "alone", **settings), "train_mean_nll")
    rewards, preferences = found.folder / "rewards", found.folder / "preferences"
    more = dict[str, Any](batch_size=4, learning_rate=2e-2, max_steps=20)
    own = dict[str, Any](group_size=8, max_tokens=16, lora_rank=4, loss_fn="importance_sampling", save_every=0)
    others = [found.start("rl_loop", rewards, **more, **own), found.start("dpo", preferences, **more)]
    wait_for(lambda: bool(metrics(rewards) and metrics(preferences)), "the other recipes")
    beside = column(found.run("sl_loop", "beside", **settings), "train_mean_nll")
    assert others[0].poll() is None, "they ran at the same time"
    assert beside == alone and alone[-1] < 0.5 * alone[0]
    earned = column(found.finish(others[0], rewards), "reward/total")
    assert fmean(earned[-4:]) > 3 * earned[0]
    losses = column(found.finish(others[1], preferences), "dpo_loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.1
