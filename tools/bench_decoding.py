"""Greedy decoding here and in transformers on the same weights and prompts, in turns in one run.

    python tools/bench_decoding.py --model runs/NAME/merged

Both decode the same number of new tokens from the same prompts with a key-value cache, and neither stops early. Times
are of a whole batch, prompts included; the table has their median, least and most over the repeats, after one turn each
that is not counted.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_tiedlora.config.cli import CommandParser, path_value, run_command

Rows = list[list[int]]


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="bench_decoding.py", description=__doc__)
    described.add_argument("--model", default="demo", metavar="M", help="folder, hub id or demo [demo]")
    described.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="of the weights [bf16]")
    described.add_argument("--batch_size", default=16, type=int, metavar="N", help="prompts at once [16]")
    described.add_argument("--new_tokens", default=64, type=int, metavar="N", help="decoded for each prompt [64]")
    described.add_argument("--repeats", default=5, type=int, metavar="N", help="turns of each that count [5]")
    described.add_argument("--json", type=path_value, metavar="FILE", help="also write the figures there")
    return described


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    options = parser().parse_known_names(argv)
    # These import torch and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    from megatron_tiedlora.base.atomic import write_json
    from megatron_tiedlora.base.errors import UserError
    from megatron_tiedlora.checkpoint.load_model import DTYPES, load_model
    from megatron_tiedlora.checkpoint.sources import find_model
    from megatron_tiedlora.data.encode import encode_prompts
    from megatron_tiedlora.data.splits import load_split
    from megatron_tiedlora.data.tokenizer import load_tokenizer
    from megatron_tiedlora.evaluation.decoder import Decoder
    from megatron_tiedlora.parallel.groups import ParallelGroups

    for name in ("batch_size", "new_tokens", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is less than 1")
    source, dtype = find_model(options.model), DTYPES[options.dtype]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    examples = load_split("demo", "test", files={}, seed=0, limit=options.batch_size)
    texts = [example.prompt for example in examples]
    room = source.shape.max_positions - options.new_tokens
    encoded, _ = encode_prompts(load_tokenizer(source.weights_folder()), texts, max_length=room)
    prompts = [ids.tolist() for ids in encoded]
    decoder = Decoder(load_model(source, None, dtype=dtype, device=device), ParallelGroups(), source.shape)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        source.weights_folder(), dtype=dtype, trust_remote_code=False
    )
    theirs = theirs.to(device).eval()
    turns = {
        "megatron_tiedlora": lambda: decode_here(decoder, prompts, options.new_tokens),
        "transformers": lambda: decode_there(theirs, prompts, options.new_tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    rows: dict[str, Rows] = {}
    for turn in tqdm(range(options.repeats + 1), desc="decoding", unit="turn", leave=False):
        for name, decode in turns.items():
            rows[name], taken = timed(decode, device)
            if turn:
                seconds[name].append(taken)
    report = {
        "model": source.name,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "batch_size": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": options.new_tokens,
        "equal_tokens": share_of_equal_tokens(*rows.values()),
        "seconds": seconds,
    }
    print("\n".join(table(report)))
    if options.json is not None:
        write_json(options.json, report)
    return 0


def timed(decode: Callable[[], Rows], device: Any) -> tuple[Rows, float]:
    """What `decode` returns, and the seconds that it took."""
    import torch

    started = time.perf_counter()
    rows = decode()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return rows, time.perf_counter() - started


def decode_here(decoder: Any, prompts: Rows, new_tokens: int) -> Rows:
    """By this package; no token ends a sequence."""
    from megatron_tiedlora.evaluation.generate import generate

    return generate(decoder, prompts, end_ids=(), max_new_tokens=new_tokens)


def decode_there(model: Any, prompts: Rows, new_tokens: int) -> Rows:
    """By transformers, prompts padded on the left as it wants them; no token ends a sequence."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    model.generation_config.eos_token_id = None
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True
    )
    rows: Rows = output[:, longest:].tolist()
    return rows


def share_of_equal_tokens(ours: Rows, theirs: Rows) -> float:
    """Of all new tokens, those that are equal up to each sequence's first difference: 1.0 in fp32, ties apart."""
    equal = 0
    for mine, other in zip(ours, theirs, strict=True):
        equal += next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return equal / sum(map(len, ours))


def table(report: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    tokens = report["batch_size"] * report["new_tokens"]
    lines = [
        f"{report['model']} in {report['dtype']} on {report['device']}: {report['batch_size']} prompts of"
        f" {report['prompt_tokens']} tokens together, {report['new_tokens']} new tokens each,"
        f" {report['equal_tokens']:.1%} of them equal",
        f"{'':<20}{'tokens/s':>10}{'seconds':>10}{'least':>8}{'most':>8}",
    ]
    for name, taken in report["seconds"].items():
        middle = statistics.median(taken)
        lines.append(f"{name:<20}{tokens / middle:>10.1f}{middle:>10.2f}{min(taken):>8.2f}{max(taken):>8.2f}")
    ours, theirs = (statistics.median(taken) for taken in report["seconds"].values())
    return [*lines, f"ratio of the medians {theirs / ours:.2f}"]


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
