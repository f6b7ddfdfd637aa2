"""What tools/bench_step.py refuses in one line before it measures, and what it measures with which flags."""

from __future__ import annotations

import pytest
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.selfcheck.compare import measure_sides
from megatron_tiedlora.selfcheck.step_bench import plan_benchmark


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"--model={write_tiny_model(tmp_path_factory.mktemp('bench') / 'model')}"


def start(flags: list[str], *, ranks: int) -> None:
    """What every rank does before it measures. A scaling of steps goes through its values first."""
    settings = parse_settings(flags, BenchSettings)
    if settings.measured_on(ranks) == "scaling":
        measure_sides(settings)
    plan_benchmark(settings, world_size=ranks)


ONE_RANK = [
    # A step.
    ("--rows=0", "--rows 0: input should be greater than or equal to 1"),
    ("--supervised=0", "--supervised 0: input should be greater than 0"),
    ("--supervised=nan", "--supervised nan: input should be a finite number"),
    ("--supervised=inf", "--supervised inf: input should be a finite number"),
    ("--supervised=1.5", "--supervised 1.5: input should be less than or equal to 1"),
    ("--length=1 --supervised=1", "--length 1: input should be greater than or equal to 2"),
    ("--length=8 --documents=8", "--supervised 0.5 with --length 8: no token has a label"),
    ("--length=16 --supervised=0.01", "--supervised 0.01 with --length 16: no token has a label"),
    ("--supervised=0.5 --task=gsm8k", "not with --task"),
    ("--samples=8", "--samples 8 goes with --task"),
    ("--padded_rows=8 --against=peft", "--padded_rows 8 goes with --task"),
    ("--padded_rows=8 --task=gsm8k", "--padded_rows 8 goes with --against peft"),
    ("--task=gsm8k --against=peft --padded_rows=5", "--samples 32 is not a multiple of --padded_rows 5"),
    ("--num_layers=2", "--num_layers 2 goes with a preset"),
    ("--task=gsm8k --samples=10", "--samples 10 is not a multiple of --rows 4"),
    ("--random_weights --task=gsm8k", "has random weights"),
    ("--model=llama2-7b --task=gsm8k", "has random weights"),
    ("--recompute=some", "--recompute some: input should be 'none', 'selective' or 'full'"),
    ("--tensor_paralel=2", "did you mean --tensor_parallel"),
    # Adapters.
    ("--adapters=0", "--adapters 0: input should be greater than or equal to 1"),
    ("--adapters=2 --against=peft", "--adapters 2 is not implemented with --against; leave one out"),
    ("--adapters=2 --task=gsm8k", "--adapters 2 is not implemented with --task; leave one out"),
    ("--shared_tokens=64", "--shared_tokens 64 goes with --adapters"),
    ("--adapters=2 --rows=2 --length=16 --shared_tokens=31", "--shared_tokens 31 is less than the micro-batch of one"),
    ("--adapters=2 --what=scaling", "--adapters 2 goes with --what step, not scaling"),
    ("--adapters=2 --tensor_parallel=2", "--adapters 2 goes with --what step, not layout"),
    # What is measured, and layouts.
    ("--against=peft --tensor_parallel=2", "--tensor_parallel 2 goes with --what layout, not step"),
    ("--what=layout --against=peft", "--against peft goes with --what step, not layout"),
    ("--what=scaling --packing=true", "--packing true goes with --what layout, not scaling"),
    ("--what=decoding --rank=2", "--rank 2 goes with --what step or layout or scaling, not decoding"),
    ("--shares=1", "--shares 1 goes with --what scaling, not step"),
    ("--what=all", "--what all: input should be 'step', 'layout', 'scaling' or 'decoding'"),
    ("--micro_batches=0", "--micro_batches 0: input should be greater than or equal to 1"),
    ("--micro_batches=2 --task=gsm8k", "--micro_batches 2 is for made-up tokens, so not with --task"),
    ("--packing=true", "--packing true goes with --task"),
    # Scaling, of a preset.
    ("--model=llama2-7b --what=scaling --ranks=2,x", "--ranks x: input should be a valid integer"),
    ("--model=llama2-7b --what=scaling --layers=0", "--layers 0"),
    ("--model=llama2-7b --what=scaling --shares=1.5", "--shares 1.5"),
    ("--model=llama2-7b --what=scaling --shares=nan", "--shares nan"),
    ("--model=llama2-7b --what=scaling --shares=0.0001", "--shares 0.0001 with --length 512: no token has a label"),
    ("--model=llama2-7b --what=scaling --lengths=1", "--lengths 1: input should be greater than or equal to 2"),
    ("--model=llama2-7b --what=scaling --lengths=8,4097", "--lengths 4097: llama2-7b was trained for 4096 positions"),
    ("--model=llama2-7b --what=scaling --length=4097", "--length 4097: llama2-7b was trained for 4096 positions"),
    ("--model=llama2-7b --what=scaling --repeats=0", "--repeats"),
    ("--model=llama2-7b --what=scaling --supervised=0", "--supervised 0"),
]
TWO_RANKS = [
    ("--adapters=2", "--adapters 2 is for one process, so not for 2 ranks"),
    ("--against=peft", "--against peft is for one process, so not for 2 ranks; start it without a launcher"),
    ("--what=scaling", "--what scaling is for one process, so not for 2 ranks"),
    ("--what=decoding", "--what decoding is for one process, so not for 2 ranks"),
    ("--tensor_parallel=3", "2 ranks are not a multiple of --tensor_parallel 3"),
    ("--pipeline_parallel=2 --ds_config=zero2.json --length=64", "ZeRO-2 does not go with --pipeline_parallel 2"),
]


@pytest.mark.parametrize(
    ("ranks", "flags", "message"), [*((1, *row) for row in ONE_RANK), *((2, *row) for row in TWO_RANKS)]
)
def test_bad_input_is_one_line(model: str, ranks: int, flags: str, message: str) -> None:
    assert message in refusal(lambda: start([model, *flags.split()], ranks=ranks))


def plan_of(model: str, *flags: str) -> RunPlan:
    """What the command plans on one rank."""
    return plan_benchmark(parse_settings([model, *flags], BenchSettings))


@pytest.mark.parametrize("layout", [(), ("--micro_batches=1",)])
def test_rows_longer_than_the_model_has_positions(model: str, layout: tuple[str, ...]) -> None:
    """Its 256 are the most, with and without an engine."""
    with pytest.raises(UserError, match=r"^--length 257: .* was trained for 256 positions. Give at most 256$"):
        plan_of(model, "--length=257", *layout)
    assert plan_of(model, "--length=256", *layout).settings.max_length == 256


def test_rows_shorter_than_a_training_run_takes(model: str) -> None:
    """A layout refuses them in the words of its own flag; one process without an engine does not mind."""
    with pytest.raises(UserError, match=r"^--length 7: a training run's rows have at least 8 tokens"):
        plan_of(model, "--length=7", "--micro_batches=1")
    assert plan_of(model, "--length=8", "--micro_batches=1").settings.max_length == 8
    plan_of(model, "--length=7")


@pytest.mark.parametrize(
    ("flags", "ranks", "measured", "packs", "micro_batches"),
    [
        ((), 1, "step", False, 1),
        (("--what=scaling",), 1, "scaling", False, 1),
        (("--what=decoding",), 1, "decoding", False, 1),
        (("--local_rank=0", "--task=gsm8k"), 1, "step", True, 1),
        ((), 2, "layout", False, 1),
        (("--sequence_parallel=true",), 1, "layout", False, 1),
        (("--documents=1",), 1, "layout", True, 1),
        (("--task=gsm8k", "--packing=false"), 1, "layout", False, 1),
        (("--pipeline_parallel=3",), 3, "layout", False, 6),
        (("--pipeline_parallel=3", "--micro_batches=2"), 3, "layout", False, 2),
    ],
)
def test_what_is_measured(flags: tuple[str, ...], ranks: int, measured: str, packs: bool, micro_batches: int) -> None:
    settings = parse_settings(flags, BenchSettings)
    assert settings.measured_on(ranks) == measured
    assert (settings.packs, settings.step_micro_batches) == (packs, micro_batches)


def test_labels_of_a_row_by_hand() -> None:
    """The first token has none that counts."""
    rows = ((2, 1.0), (2, 0.5), (16, 0.5), (16, 1.0))
    settings = [BenchSettings(what="step", length=length, supervised=share) for length, share in rows]
    assert [one.labels for one in settings] == [1, 1, 8, 15]
