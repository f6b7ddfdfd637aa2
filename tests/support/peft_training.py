"""A training run of a PEFT model, with a schedule and samples of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from support.engine_runs import settings_of, write_uneven_data
from support.oracle import OracleAdapter, OracleConfig
from support.oracle_adapter import TARGET_PARTS, tensor_name
from support.tiny_models import BOS_ID, EOS_ID

STEPS, ROWS, RANK, ALPHA = 20, 8, 3, 6.0


def settings_for_peft(model: Path, folder: Path) -> dict[str, Any]:
    """A run of `model` whose every step takes all rows, so that their order does not matter."""
    return {
        **settings_of(model, folder),
        "train_file": str(write_uneven_data(folder / "all.jsonl", rows=ROWS)),
        "global_batch_size": ROWS,
        "micro_batch_size": 4,
        "max_steps": STEPS,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": 5e-3,
    }


def samples(settings: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (1, S) of each row, and the labels of positions 1 to S - 1: -100 in the prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    for line in Path(settings["train_file"]).read_text().splitlines():
        row = json.loads(line)
        texts = [row["prompt"], f" {row['completion']}"]
        prompt, answer = tokenizer(texts, add_special_tokens=False).input_ids
        tokens = torch.tensor([[BOS_ID, *prompt, *answer, EOS_ID]])
        labels = tokens[0, 1:].clone()
        labels[: len(prompt)] = -100
        yield tokens, labels


Tensors = dict[str, torch.Tensor]
Trained = tuple[Any, Callable[[], Tensors]]
"""PEFT's model, and its tensors by this package's names as they are when asked for."""


def through_lora_on_all_linears(base: Any, start: OracleAdapter) -> Trained:
    """PEFT's LoRA on all linears of `base`, a model of transformers, with the factors of `start`.

    Modules that a target fuses share one A.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=start.rank, lora_alpha=start.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    sizes, factors = OracleConfig.from_folder(Path(base.name_or_path)), dict[str, list[tuple[Any, list[Any]]]]()
    for target, parts in TARGET_PARTS.items():
        for index, layer in enumerate(start.layers):
            a, b = (start.tensor(target, factor)[index] for factor in "AB")
            shared, stacked = torch.nn.Parameter(a.clone()), list[Any]()
            for name, rows in zip(parts.values(), b.split(sizes.target_rows(target)), strict=True):
                module = model.get_submodule(f"base_model.model.model.layers.{layer - 1}.{name}")
                module.lora_A["default"].weight = shared
                with torch.no_grad():
                    module.lora_B["default"].weight.copy_(rows)
                stacked.append(module.lora_B["default"].weight)
            factors.setdefault(target, []).append((shared, stacked))

    def found() -> Tensors:
        tensors = {}
        for target, of_layers in factors.items():
            tensors[tensor_name(target, "A")] = torch.stack([a.detach() for a, _ in of_layers])
            tensors[tensor_name(target, "B")] = torch.stack([torch.cat(rows).detach() for _, rows in of_layers])
        return tensors

    return model, found


def peft_losses(model: Any, trained: Sequence[torch.nn.Parameter], settings: dict[str, Any]) -> list[float]:
    """The losses of a run of `settings` whose every step takes all rows; `trained` are changed."""
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
    rows = list(samples(settings))
    num_supervised = sum(int((labels != -100).sum()) for _, labels in rows)
    losses = []
    for step in range(settings["max_steps"]):
        after = step - settings["warmup_steps"]
        share = (1 + math.cos(math.pi * after / (settings["max_steps"] - settings["warmup_steps"]))) / 2
        rate = share if after >= 0 else (step + 1) / settings["warmup_steps"]
        optimizer.param_groups[0]["lr"] = settings["learning_rate"] * rate
        optimizer.zero_grad()
        loss = 0.0
        for tokens, labels in rows:
            logits = model(tokens).logits[0, :-1]
            addend = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_supervised
            addend.backward()
            loss += addend.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, settings["gradient_clipping"])
        assert norm > settings["gradient_clipping"], "clipping must be active"
        optimizer.step()
        losses.append(loss)
    return losses
