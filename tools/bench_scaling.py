"""How a training step's time grows with layers, length, rank and supervised tokens: each alone, the rest as given.

    python tools/bench_scaling.py                                      layers of 7B's width with random weights
    python tools/bench_scaling.py --ranks 2,128 --repeats 9            more turns, where a difference is small

The values of one quantity are measured in turns, as in bench_step.py, which this is made of.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from bench_step import labels_of_row

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.config.cli import CommandParser, run_command
from megatron_tiedlora.config.presets import PRESETS

# Flag of the values, what of a step they set, and of which type they are.
AXES = (
    ("layers", "num_layers", int),
    ("lengths", "length", int),
    ("ranks", "rank", int),
    ("shares", "supervised", float),
)


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="bench_scaling.py", description=__doc__)
    described.add_argument("--model", default="llama2-7b", choices=sorted(PRESETS), help="whose widths [llama2-7b]")
    described.add_argument("--method", default="tl6", choices=METHOD_NAMES, help="what is trained [tl6]")
    described.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="of the frozen base [bf16]")
    described.add_argument("--compile", default="auto", choices=("auto", "true", "false"), help="kernels [auto]")
    described.add_argument("--rows", default=1, type=int, metavar="N", help="of the micro-batch [1]")
    described.add_argument("--num_layers", default=2, type=int, metavar="N", help="where others vary [2]")
    described.add_argument("--length", default=512, type=int, metavar="N", help="where others vary [512]")
    described.add_argument("--rank", default=8, type=int, metavar="R", help="where others vary [8]")
    described.add_argument("--supervised", default=1.0, type=float, metavar="X", help="where others vary [1]")
    described.add_argument("--layers", default="1,2,4", metavar="N,N", help="layers to measure ['' for none; 1,2,4]")
    described.add_argument("--lengths", default="256,512,1024,2048", metavar="N,N", help="[256,512,1024,2048]")
    described.add_argument("--ranks", default="2,8,32,128", metavar="R,R", help="[2,8,32,128]")
    described.add_argument("--shares", default="0.125,0.25,0.5,1", metavar="X,X", help="supervised [0.125,0.25,0.5,1]")
    described.add_argument("--repeats", default=5, type=int, metavar="N", help="turns that count [5]")
    return described


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    options = parser().parse_known_names(argv)
    axes = {flag: _values(options, flag, kind) for flag, _, kind in AXES}
    if min(options.rows, options.num_layers, options.length, options.rank, options.repeats) < 1:
        raise UserError("--rows, --num_layers, --length, --rank and --repeats are at least 1")
    steps = {flag: [_step(options, flag, name, value) for value in axes[flag]] for flag, name, _ in AXES}
    # These import torch, which takes seconds: --help and a wrong flag do not wait for it.
    from bench_contestants import check_positions, our_kernels

    most = PRESETS[options.model]["max_position_embeddings"]
    for length, flag in ((options.length, "length"), *((length, "lengths") for length in axes["lengths"])):
        check_positions(length, most, model=options.model, flag=flag)
    chosen = our_kernels(_step(options))
    print(f"{options.model}, {options.method}, {options.dtype}; kernels {chosen.description}", flush=True)
    for flag, name, _ in AXES:
        if steps[flag]:
            measured = _measure(name, steps[flag], chosen, repeats=options.repeats)
            print("\n".join(table(name, measured)), flush=True)
    return 0


def _values(options: Namespace, flag: str, kind: type) -> list[Any]:
    text = getattr(options, flag)
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--{flag} {text}: give numbers with commas between them") from None
    if any(value <= 0 for value in values):
        raise UserError(f"--{flag} {text}: give numbers above 0")
    return values


def _step(options: Namespace, flag: str = "", name: str = "", value: Any = None) -> Namespace:
    """The options of one step as in bench_step.py: as given but for one quantity, whose values `flag` gave.

    Raises:
        UserError: no token of its rows has a label.
    """
    changed = {name: value} if name else {}
    step = Namespace(**{**vars(options), "task": None, "against": None, "recompute": "none", "documents": 1, **changed})
    step.labels = labels_of_row(step.length, step.supervised, flags={name: flag})
    return step


def _measure(
    name: str, steps: Sequence[Namespace], chosen: Any, *, repeats: int
) -> list[tuple[Any, int, list[float]]]:
    """(value, tokens, seconds) of each value of one quantity, in turns."""
    from bench_contestants import OURS, contestants
    from tqdm import tqdm

    from megatron_tiedlora.training.throughput import timed

    sides = [contestants(step, chosen)[OURS]() for step in steps]
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in tqdm(range(repeats + 1), desc=name, unit="turn", leave=False):
        for side, taken in zip(sides, seconds, strict=True):
            found = timed(side.step, side.device)
            if turn:
                taken.append(found)
    values = [getattr(step, name) for step in steps]
    return [(value, side.num_tokens, taken) for value, side, taken in zip(values, sides, seconds, strict=True)]


def table(name: str, measured: Sequence[tuple[Any, int, Sequence[float]]]) -> list[str]:
    """Lines: seconds, tokens/s, and the seconds beyond those of the value before for each unit more."""
    lines = [f"{name:<12}{'tokens':>8}{'seconds':>9}{'least':>8}{'most':>8}{'tokens/s':>10}{'more, for 1 more':>18}"]
    before: tuple[float, float] | None = None
    for value, tokens, seconds in measured:
        middle = statistics.median(seconds)
        slope = "" if before is None else f"{(middle - before[1]) / (value - before[0]):.4f}"
        lines.append(
            f"{value!s:<12}{tokens:>8}{middle:>9.3f}{min(seconds):>8.3f}{max(seconds):>8.3f}{tokens / middle:>10.1f}"
            f"{slope:>18}"
        )
        before = (float(value), middle)
    return lines


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
