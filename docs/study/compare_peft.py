"""Train adapters of PEFT's own methods and of this package on the same steps, for the table in docs/study.md.

    python docs/study/compare_peft.py MODEL DATA OUTPUT.csv [--steps 12]

MODEL is a Hugging Face folder, DATA the output of split_xquad.py. The linears of q, k and v are adapted. Each
method is trained with three learning rates on a bf16 base; the one with the lowest validation loss gives the loss of
the test answers. Differences from tl6 are paired by question; their errors are those of questions, not of seeds. A
second start continues after the last method in OUTPUT.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from megatron_tiedlora.peft import TiedLoraConfig

SEED = 1234
BATCH, WARMUP, CLIPPING, DECAY = 8, 2, 1.0, 0.01
ROWS_OF_FORWARD = 16
QKV = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
# By method its middle rate, of which the others are a third and the triple, and its config. The last is compared with.
METHODS: dict[str, tuple[float, Callable[[], Any]]] = {
    "LoRA r 8": (5e-3, lambda: peft.LoraConfig(r=8, lora_alpha=8, **QKV)),
    "VeRA r 256": (3e-2, lambda: peft.VeraConfig(r=256, projection_prng_key=SEED, **QKV)),
    "tl5 r 8": (1e-2, lambda: TiedLoraConfig(method="tl5", r=8)),
    "tl6 r 8": (2e-2, lambda: TiedLoraConfig(method="tl6", r=8)),
}
Row = tuple[list[int], list[int]]  # token ids, and labels of which the prompt's are -100


def encode(tokenizer: Any, file: Path) -> list[Row]:
    """The rows of a file: prompt, first answer, end; the answer and the end are supervised."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"{row['context']}\n\nQuestion: {row['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {row['answers'][0]}")["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    return rows


def row_losses(model: Any, rows: list[Row]) -> torch.Tensor:
    """Mean loss over the supervised tokens of each row, (rows,) fp32."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row, _ in rows])
    supervised = labels[:, 1:] != -100
    first = int(supervised.any(dim=0).nonzero()[0])  # logits before the first answer are not needed
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=length - first).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels[:, first + 1 :], reduction="none")
    return losses.sum(dim=1) / supervised.sum(dim=1)


@torch.no_grad()
def all_losses(model: Any, rows: list[Row]) -> torch.Tensor:
    """The loss of each row, (rows,)."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
    losses = torch.empty(len(rows))
    for start in range(0, len(rows), ROWS_OF_FORWARD):
        part = order[start : start + ROWS_OF_FORWARD]
        losses[part] = row_losses(model, [rows[row] for row in part])
    return losses


def train(folder: str, config: Any, rate: float, rows: list[Row], steps: int) -> Any:
    """A model with an adapter that was trained for `steps` batches."""
    torch.manual_seed(SEED)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), config)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    order = torch.Generator().manual_seed(SEED)
    batches = torch.cat(
        [torch.randperm(len(rows), generator=order) for _ in range(math.ceil(steps * BATCH / len(rows)))]
    )
    model.train()
    for step in tqdm(range(steps), disable=None):
        batch = batches[step * BATCH : (step + 1) * BATCH].tolist()
        row_losses(model, [rows[row] for row in batch]).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIPPING)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def score(
    folder: str, config: Callable[[], Any], rates: list[float], rows: dict[str, list[Row]], steps: int
) -> dict[str, str]:
    """A row of the table: validation losses of all rates, and the test losses of the best one."""
    best, losses = None, list[float]()
    for rate in rates:
        model = train(folder, config(), rate, rows["train"], steps)
        loss = all_losses(model, rows["validation"]).mean().item()
        losses.append(loss if math.isfinite(loss) else math.inf)
        best = model if losses[-1] == min(losses) else best
    test = all_losses(best, rows["test"])
    return {
        "parameters": str(sum(value.numel() for value in best.parameters() if value.requires_grad)),
        "rates": " ".join(f"{rate:.1e}" for rate in rates),
        "validation_losses": " ".join(f"{loss:.4f}" for loss in losses),
        "test_loss": f"{test.mean():.4f}",
        "test_losses": " ".join(f"{loss:.3f}" for loss in test),
    }


def print_table(found: list[dict[str, str]]) -> None:
    """Print the methods as Markdown, with differences from the last one, tl6, and their 95 % intervals."""
    losses = {row["method"]: torch.tensor([float(loss) for loss in row["test_losses"].split()]) for row in found}
    last = losses[found[-1]["method"]]
    print("| method | parameters | rate | validation loss | test loss | - tl6's |\n|---|---|---|---|---|---|")
    for row in found:
        tried, rates = [float(loss) for loss in row["validation_losses"].split()], row["rates"].split()
        rate = rates[tried.index(min(tried))]
        rate += "*" if rate in (rates[0], rates[-1]) else ""  # an edge: another rate may be better
        apart = losses[row["method"]] - last
        mean, wide = apart.mean(), 1.96 * apart.std() / len(apart) ** 0.5
        print(
            f"| {row['method']} | {int(row['parameters']):,} | {rate} | {min(tried):.3f} "
            f"| {float(row['test_loss']):.3f} | {mean:+.3f} ({mean - wide:+.3f}, {mean + wide:+.3f}) |"
        )


def main() -> None:
    """Write a row for each method, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = {part: encode(tokenizer, given.data / f"{part}.jsonl") for part in ("train", "validation", "test")}
    found: list[dict[str, str]] = []
    same = {"model": given.model, "steps": str(given.steps)}
    if given.output.exists():
        found = list(csv.DictReader(given.output.open(encoding="utf-8")))
        if any(row[name] != value for row in found for name, value in same.items()):
            parser.error(f"{given.output}: its rows have another model or other steps; give a new file")
    for method, (middle, config) in list(METHODS.items())[len(found) :]:
        rates = [middle / 3, middle, 3 * middle]
        found.append({"method": method, **same, **score(given.model, config, rates, rows, given.steps)})
        with given.output.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    print_table(found)


if __name__ == "__main__":
    main()
