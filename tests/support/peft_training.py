"""A training run of a PEFT model, with a schedule and samples of its own. Uses nothing of the package."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import BOS_ID, EOS_ID


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
