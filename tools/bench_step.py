"""One training step: alone, beside Hugging Face + PEFT LoRA on the same samples, or at a layout of several ranks.

    python tools/bench_step.py --against peft                                        4 x 512 tokens, half of them
                                                                                     with a label
    python tools/bench_step.py --against peft --task gsm8k --train_file train.jsonl  real samples: packed here; there
                                                                                     padded in batches, and packed
    python tools/bench_step.py --model llama2-7b --num_layers 2 --supervised 1       a preset's shape, random weights
    deepspeed --num_gpus 8 tools/bench_step.py --model llama2-70b --tensor_parallel 4 --pipeline_parallel 2

One process: a step is forward and backward over all micro-batches and AdamW's step, without an engine. Both sides take
turns and share process, allocator and threads; memory is measured in a process of its own for each side.

A layout (several ranks, or any of its flags): a step is that of launch/train.py, through the same plan, build and
DeepSpeed engine, and lasts as long as on the slowest rank. Beside the figures of one process the report has the peak
memory of each stage, and messages and bytes by group as one step sends them, compared with what --dry_run predicts.
Weights of a preset are drawn in place on each rank.

Seconds are medians over the repeats, after turns that are not counted. `of matmul` is the share of a bare product's
speed in the same run, on all ranks at once; saved bytes are what autograd keeps of all micro-batches of a step, beside
the formula of docs/performance.md. On a GPU the report also has MFU by the data sheet and the time by class of kernels.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.config.cli import CommandParser, path_value, run_command
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.runtime.launch_env import first_to_fail, prepare_environment, rank_and_world_size
from megatron_tiedlora.runtime.process_group import leave_process_group

BOOLEANS = ("true", "false")
# Flags that make the step one of a layout, and what they stand for where others are given.
LAYOUT_DEFAULTS = {
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "sequence_parallel": "true",
    "ds_config": "zero1.json",
    "micro_batches": 1,
    "packing": "false",
}


def parser() -> CommandParser:
    """The command's flags."""
    described = CommandParser(prog="bench_step.py", description=__doc__)
    described.add_argument("--model", default="demo", metavar="M", help="folder, hub id, demo or a preset [demo]")
    described.add_argument("--num_layers", type=int, metavar="N", help="of random weights: so many layers [all]")
    described.add_argument(
        "--random_weights", action="store_true", help="draw weights in the model's shape, as for a preset; read none"
    )
    described.add_argument("--method", default="tl6", choices=METHOD_NAMES, help="what is trained here [tl6]")
    described.add_argument("--rank", default=8, type=int, metavar="R", help="of both sides [8]")
    described.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"), help="of the frozen base [bf16]")
    described.add_argument(
        "--compile", default="auto", choices=("auto", "true", "false"), help="our kernels, where it can be done [auto]"
    )
    described.add_argument(
        "--recompute", default="none", choices=("none", "selective", "full"), help="of layers, on our side [none]"
    )
    described.add_argument("--rows", default=4, type=int, metavar="N", help="of a made-up micro-batch [4]")
    described.add_argument("--length", default=512, type=int, metavar="N", help="of its rows, or of packed rows [512]")
    described.add_argument(
        "--supervised", type=float, metavar="X", help="share of its tokens with a label, at the end [0.5]"
    )
    described.add_argument("--documents", type=int, metavar="N", help="of each made-up row, as equal samples [1]")
    described.add_argument("--task", metavar="T", help="take real samples of this task instead")
    described.add_argument("--train_file", metavar="FILE", help="its rows [the task's own]")
    described.add_argument("--samples", type=int, metavar="N", help="of the task, in one step [32]")
    described.add_argument("--against", choices=("peft",), help="what to run beside it [nothing]")
    described.add_argument("--padded_rows", type=int, metavar="N", help="samples of a padded batch there [8]")
    described.add_argument("--repeats", default=5, type=int, metavar="N", help="turns of each that count [5]")
    described.add_argument("--json", type=path_value, metavar="FILE", help="also write the figures there")
    layout = described.add_argument_group("layout", "a training run's step on all ranks; as in launch/train.py")
    layout.add_argument("--tensor_parallel", type=int, metavar="T", help="ranks that share each layer [1]")
    layout.add_argument("--pipeline_parallel", type=int, metavar="P", help="stages that share the layers [1]")
    layout.add_argument("--sequence_parallel", choices=BOOLEANS, help="cut activations between layers too [true]")
    layout.add_argument("--ds_config", metavar="FILE", help="DeepSpeed JSON with engine knobs [zero1.json]")
    layout.add_argument("--packing", choices=BOOLEANS, help="several samples of --task in a row [true]")
    layout.add_argument(
        "--micro_batches", type=int, metavar="N", help="made-up ones, per rank and step [1; with a pipeline 2 x P]"
    )
    # The launchers put it before all others; ranks are read from the environment.
    described.add_argument("--local_rank", "--local-rank", type=int, help=SUPPRESS)
    return described


def main(argv: Sequence[str]) -> int:
    """Measure and print on one rank; returns its exit status."""
    options = parser().parse_known_names(argv)
    prepare_environment()
    rank, world_size = rank_and_world_size()
    resolve(options, world_size)
    # These import DeepSpeed and transformers, which takes seconds: --help and a wrong flag do not wait for it.
    from bench_report import layout_table, sides_table

    if not options.layout:
        report = measure_sides(options)
        _publish(options, report, sides_table(report))
        return 0
    from bench_layout import measure

    from megatron_tiedlora.runtime.stopping import RunStopped, exit_status

    try:
        measure(
            options,
            rank=rank,
            world_size=world_size,
            publish=lambda report: _publish(options, report, layout_table(report)),
        )
    except RunStopped as stop:
        return exit_status(stop.signal_number)
    leave_process_group()
    return 0


def _publish(options: Namespace, report: dict[str, Any], lines: Sequence[str]) -> None:
    """Print the table and write --json. Raises UserError where it cannot be written."""
    from megatron_tiedlora.base.atomic import write_json

    print("\n".join(lines), flush=True)
    if options.json is not None:
        write_json(options.json, report)


def measure_sides(options: Namespace) -> dict[str, Any]:
    """The report of one process: ours, and what it is compared with."""
    from bench_contestants import OURS, contestants, largest_frozen, matmul_peak
    from bench_layout import gpu_figures, make_plan, saved_formula
    from bench_report import describe_setup
    from tqdm import tqdm

    from megatron_tiedlora.training.throughput import find_peak, timed

    plan = make_plan(options, rank=0, world_size=1)
    sides = contestants(options)
    memory: dict[str, dict[str, Any]] = {}
    for name in sides:
        memory[name] = {what: in_own_process(options, name, what) for what in ("saved", "peak")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    made = {name: make() for name, make in sides.items()}
    for turn in tqdm(range(options.repeats + 1), desc="steps", unit="turn", leave=False):
        for name, side in made.items():
            taken = timed(side.step, side.device)
            if turn:
                seconds[name].append(taken)
    ours = made[OURS]
    formula = saved_formula(plan, ours.batches)
    memory[OURS] |= {"saved_formula": formula, "saved_ratio": memory[OURS]["saved"] / formula}
    if ours.device.type == "cuda":
        peak = find_peak(ours.device, plan.dtype).flops_per_second
        for name, side in made.items():
            taken = statistics.median(seconds[name])
            memory[name] |= gpu_figures(side.step, flops=side.flops, seconds=taken, peak=peak)
    return {
        "model": options.model,
        "method": options.method,
        "rank": options.rank,
        "dtype": options.dtype,
        "recompute": options.recompute,
        "kernels": ours.kernels,
        **describe_setup(ours.device),
        "matmul_flops_per_second": matmul_peak(largest_frozen(ours), ours.batches, plan.dtype, ours.device),
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


def resolve(options: Namespace, world_size: int = 1) -> None:
    """Fill in defaults and say whether it is a `layout`; raises UserError for what does not fit or would be ignored."""
    real = options.task is not None
    given = [f"--{name} {getattr(options, name)}" for name in LAYOUT_DEFAULTS if getattr(options, name) is not None]
    options.layout = bool(given) or world_size > 1
    if options.against is not None and options.layout:
        what = f"{world_size} ranks" if world_size > 1 else given[0]
        raise UserError(f"--against {options.against} is for one process without an engine, so not with {what}")
    needs = {
        "supervised": (not real, "tokens that are made up, so not with --task"),
        "documents": (not real and options.against is None, "tokens that are made up, so not with --task or --against"),
        "samples": (real, "--task"),
        "train_file": (real, "--task"),
        "padded_rows": (real and options.against == "peft", "--task and --against peft"),
        "micro_batches": (not real, "tokens that are made up, so not with --task"),
        "packing": (real, "--task"),
    }
    for name, (fits, what) in needs.items():
        if getattr(options, name) is not None and not fits:
            raise UserError(f"--{name} {getattr(options, name)} goes with {what}")
    options.layout = options.layout or options.documents is not None
    defaults = {"supervised": 0.5, "documents": 1, "samples": 32, "padded_rows": 8, **LAYOUT_DEFAULTS}
    if (options.pipeline_parallel or 1) > 1:
        defaults["micro_batches"] = 2 * options.pipeline_parallel
    if real or options.documents is not None:
        defaults["packing"] = "true"
    for name, value in defaults.items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    sizes = ("rank", "rows", "length", "samples", "padded_rows", "repeats")
    for name in (*sizes, "documents", "tensor_parallel", "pipeline_parallel", "micro_batches"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} is less than 1")
    options.labels = labels_of_row(options.length // options.documents, options.supervised)
    drawn = options.model in PRESETS or options.random_weights
    if options.num_layers is not None and (not drawn or options.num_layers < 1):
        raise UserError(
            f"--num_layers {options.num_layers} goes with a preset or --random_weights and is at least 1:"
            f" {', '.join(PRESETS)}"
        )
    if real and drawn:
        raise UserError(f"--task {options.task} needs a model that reads: --model {options.model} has random weights")
    for name in ("rows", *(["padded_rows"] if options.against is not None else [])) if real else ():
        if options.samples % getattr(options, name):
            raise UserError(f"--samples {options.samples} does not divide by --{name} {getattr(options, name)}")


def labels_of_row(length: int, share: float, *, flags: Mapping[str, str] | None = None) -> int:
    """How many tokens of a made-up row have a label that counts: the first has no position that could predict it.

    Args:
        flags: what gave `length` and `supervised`, where flags of other names did.

    Raises:
        UserError: none has, or the share is none.
    """
    flags = {"length": "length", "supervised": "supervised", **(flags or {})}
    if not 0 < share <= 1:  # nor is nan
        raise UserError(f"--{flags['supervised']} {share}: give a share above 0, up to 1")
    if length < 2:
        raise UserError(f"--{flags['length']} {length}: a row of one token has nothing to predict; give at least 2")
    labels = min(round(share * length), length - 1)
    if labels < 1:
        raise UserError(
            f"--{flags['supervised']} {share} with --{flags['length']} {length}: no token has a label; give more of one"
        )
    return labels


def in_own_process(options: Namespace, name: str, what: str) -> int | None:
    """One figure of one side's memory, measured in a process that has done nothing else.

    Raises:
        UserError: the process ended without it, as when a system without memory left kills it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        try:
            return processes.submit(memory_of, options, name, what).result()
        except BrokenProcessPool:
            raise UserError(
                f"{name}: the process that measures its memory was ended, most likely for want of memory; give less"
                " --rows, --length or --num_layers"
            ) from None


def memory_of(options: Namespace, name: str, what: str) -> int | None:
    """`saved` or `peak` bytes of a side's step."""
    from bench_contestants import contestants, peak_bytes, saved_bytes

    side = contestants(options)[name]()
    return saved_bytes(side) if what == "saved" else peak_bytes(side)


if __name__ == "__main__":
    run_command(main, sys.argv[1:], reports=first_to_fail)
