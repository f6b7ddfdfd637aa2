"""One training step here, beside Hugging Face + PEFT LoRA on the same samples, in turns in one run.

    python tools/bench_step.py --against peft                                        4 x 512 tokens, half of them
                                                                                     with a label
    python tools/bench_step.py --against peft --task gsm8k --train_file train.jsonl  real samples: packed here; there
                                                                                     padded in batches, and packed
    python tools/bench_step.py --model llama2-7b --num_layers 2 --supervised 1       a preset's shape, random weights

A step is forward and backward over all micro-batches and AdamW's step, on one process and without an engine. Seconds
are medians over the repeats, after one turn that is not counted; both sides share process, allocator and threads.
Memory is measured in a process of its own for each side.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tiedlora.config.cli import CommandParser, run_command
from megatron_tiedlora.config.settings import METHOD_NAMES


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="bench_step.py", description=__doc__)
    described.add_argument("--model", default="demo", metavar="M", help="folder, hub id, demo or a preset [demo]")
    described.add_argument("--num_layers", type=int, metavar="N", help="of a preset: keep so many layers [all]")
    described.add_argument("--method", default="tl6", choices=METHOD_NAMES, help="what is trained here [tl6]")
    described.add_argument("--rank", default=8, type=int, metavar="R", help="of both sides [8]")
    described.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="of the frozen base [bf16]")
    described.add_argument(
        "--compile", default="auto", choices=("auto", "true", "false"), help="our kernels, where it can be done [auto]"
    )
    described.add_argument("--rows", default=4, type=int, metavar="N", help="of a made-up micro-batch [4]")
    described.add_argument("--length", default=512, type=int, metavar="N", help="of its rows, or of packed rows [512]")
    described.add_argument(
        "--supervised", type=float, metavar="X", help="share of its tokens with a label, at the end [0.5]"
    )
    described.add_argument("--task", metavar="T", help="take real samples of this task instead")
    described.add_argument("--train_file", metavar="FILE", help="its rows [the task's own]")
    described.add_argument("--samples", type=int, metavar="N", help="of the task, in one step [32]")
    described.add_argument("--against", choices=("peft",), help="what to run beside it [nothing]")
    described.add_argument("--padded_rows", type=int, metavar="N", help="samples of a padded batch there [8]")
    described.add_argument("--repeats", default=5, type=int, metavar="N", help="turns of each that count [5]")
    described.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return described


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    options = parser().parse_known_names(argv)
    _resolve(options)
    import torch
    from bench_contestants import contestants, matmul_peak
    from tqdm import tqdm

    from megatron_tiedlora.checkpoint.atomic import write_json
    from megatron_tiedlora.training.throughput import timed

    sides = contestants(options)
    memory = {}
    for name in sides:
        memory[name] = {what: in_own_process(options, name, what) for what in ("saved", "peak")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    made = {name: make() for name, make in sides.items()}
    for turn in tqdm(range(options.repeats + 1), desc="steps", unit="turn", leave=False):
        for name, side in made.items():
            taken = timed(side.step, side.device)
            if turn:
                seconds[name].append(taken)
    peak = matmul_peak(next(iter(made.values())), options.dtype)
    device = next(iter(made.values())).device
    report: dict[str, Any] = {
        "model": options.model,
        "method": options.method,
        "rank": options.rank,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "matmul_flops_per_second": peak,
        "sides": {
            name: {
                "seconds": seconds[name],
                "tokens": side.num_tokens,
                "supervised": side.num_supervised,
                "positions": side.num_positions,
                "model_flops": side.flops,
                **memory[name],
            }
            for name, side in made.items()
        },
    }
    print("\n".join(table(report)))
    if options.json is not None:
        write_json(options.json, report)
    return 0


def _resolve(options: Namespace) -> None:
    """Fill in defaults; raises UserError for what does not fit or would be ignored."""
    from megatron_tiedlora.config.errors import UserError
    from megatron_tiedlora.config.presets import PRESETS

    real = options.task is not None
    needs = {
        "supervised": (not real, "tokens that are made up, so not with --task"),
        "samples": (real, "--task"),
        "train_file": (real, "--task"),
        "padded_rows": (real and options.against == "peft", "--task and --against peft"),
    }
    for name, (fits, what) in needs.items():
        if getattr(options, name) is not None and not fits:
            raise UserError(f"--{name} {getattr(options, name)} goes with {what}")
    defaults = {"supervised": 0.5, "samples": 32, "padded_rows": 8}
    for name, value in defaults.items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    for name in ("rank", "rows", "length", "samples", "padded_rows", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is less than 1")
    if not 1 <= round(options.supervised * options.length) <= options.length:
        raise UserError(f"--supervised {options.supervised}: give a share of the {options.length} tokens of a row")
    if options.num_layers is not None and (options.model not in PRESETS or options.num_layers < 1):
        raise UserError(f"--num_layers {options.num_layers} goes with a preset and is at least 1: {', '.join(PRESETS)}")
    if real and options.model in PRESETS:
        raise UserError(f"--task {options.task}: --model {options.model} is a shape without a tokenizer")
    for name in ("rows", "padded_rows") if real else ():
        if options.samples % getattr(options, name):
            raise UserError(f"--samples {options.samples} does not divide by --{name} {getattr(options, name)}")


def in_own_process(options: Namespace, name: str, what: str) -> int:
    """One figure of one side's memory, measured in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory_of, (options, name, what))


def memory_of(options: Namespace, name: str, what: str) -> int:
    """`saved` or `peak` bytes of a side's step."""
    from bench_contestants import contestants, peak_bytes, saved_bytes

    side = contestants(options)[name]()
    return saved_bytes(side) if what == "saved" else peak_bytes(side)


def tokens_per_second(side: dict[str, Any]) -> float:
    """Real tokens, padding left out, at the median."""
    return float(side["tokens"] / statistics.median(side["seconds"]))


def table(report: dict[str, Any]) -> list[str]:
    """The figures as lines; ratios are to the first side."""
    peak, sides = report["matmul_flops_per_second"], report["sides"]
    lines = [
        f"{report['model']}, {report['method']} r {report['rank']}, {report['dtype']} on {report['device']};"
        f" a bare matmul does {peak / 1e9:,.0f} GFLOP/s",
        f"{'':<20}{'seconds':>9}{'least':>8}{'most':>8}{'tokens/s':>10}{'padding':>9}{'of matmul':>11}"
        f"{'saved MB':>10}{'peak MB':>9}",
    ]
    for name, side in sides.items():
        middle = statistics.median(side["seconds"])
        share = "" if side["model_flops"] is None else f"{side['model_flops'] / middle / peak:.0%}"
        lines.append(
            f"{name:<20}{middle:>9.2f}{min(side['seconds']):>8.2f}{max(side['seconds']):>8.2f}"
            f"{tokens_per_second(side):>10.1f}{1 - side['tokens'] / side['positions']:>9.1%}{share:>11}"
            f"{side['saved'] / 1e6:>10.1f}{side['peak'] / 1e6:>9.1f}"
        )
    ours, *others = sides
    for name in others:
        speed = tokens_per_second(sides[ours]) / tokens_per_second(sides[name])
        saved, top = (sides[ours][key] / sides[name][key] for key in ("saved", "peak"))
        lines.append(f"against {name}: speed {speed:.2f}, saved bytes {saved:.2f}, peak {top:.2f}")
    return lines


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
