"""tools/bench_step.py at layouts: real steps of two ranks, whose messages are those that --dry_run predicts; and what
it refuses in one line before it measures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from support.engine_runs import write_uneven_data
from support.folders import ROOT
from support.planned import stage_memory, step_parts
from support.ranks import ENVIRONMENT, free_port
from support.run_helpers import Ended, run_ranks, start_command
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.parallel.groups import DATA, TENSOR, WORLD, Traffic
from megatron_tiedlora.planning.layout import shared_shape
from megatron_tiedlora.planning.machines import CPU, Constant
from megatron_tiedlora.planning.planned import Planned, StepPlan
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.planning.step_time import Links, step_seconds
from megatron_tiedlora.selfcheck.bench_report import report_lines
from megatron_tiedlora.selfcheck.compare import measure_sides
from megatron_tiedlora.selfcheck.step_bench import compare_traffic, plan_benchmark
from megatron_tiedlora.selfcheck.timing import CLASSES, describe_allocator, kernel_class, kernel_seconds

TOOL = ROOT / "tools" / "bench_step.py"
SHARED = ("--dtype=fp32", "--rank=3", "--rows=2", "--length=64", "--repeats=2", "--compile=false")
TABLE_HEADS = ("of matmul", "layout: 2 ranks", "bytes per rank", "  measured, of", "  counted in a step")
VERDICT = "every message and byte of all ranks as predicted"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its shape alone, and rows of samples."""
    folder = tmp_path_factory.mktemp("bench")
    model = write_tiny_model(folder / "model", num_heads=8, num_kv_heads=4, vocab_size=321)
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_bytes((model / "config.json").read_bytes())
    write_uneven_data(folder / "train.jsonl")
    return folder


def bench(folder: Path, tmp_path: Path, *flags: str, ranks: int, model: str = "model") -> Ended:
    """The command on so many ranks, which a time limit stops."""
    arguments = [f"--model={folder / model}", *SHARED, f"--json={tmp_path / 'bench.json'}", *flags]
    return run_ranks(arguments, folder=tmp_path, ranks=ranks, script=TOOL)


def report_of(tmp_path: Path) -> dict[str, Any]:
    """What --json holds, with what every layout's report has checked."""
    report: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    assert report["device"].startswith("CPU") and report["allocator"] and report["threads"] == 1
    assert {"torch", "deepspeed"} <= set(report["versions"])
    assert len(report["seconds"]) == 2 and min(report["seconds"]) > 0
    assert report["tokens_per_second"] > 0 and report["share_of_matmul"] > 0
    rates = [member["matmul_flops_per_second"] for member in report["ranks"]]
    assert report["matmul_flops_per_second"] == sum(rates) and report["model_flops"] > 0
    assert report["mfu"] is None and report["kernel_seconds"] is None
    assert report["as_predicted"] and [member["number"] for member in report["ranks"]] == list(range(len(rates)))
    for member in report["ranks"]:
        assert 0 < member["held"] <= member["peak"]
        if member["saved"] is not None:
            # Beside the plan: fp32 rotations of heads of 4, and for labels no more than eight numbers each.
            beside = member["saved"] - member["saved_formula"] - 16 * report["positions"]
            assert 0 <= beside <= 64 * report["supervised"]
            assert member["saved_ratio"] == member["saved"] / member["saved_formula"]
        assert all(found["messages"] > 0 and found["bytes"] > 0 for found in member["traffic"].values())
        assert all(found["as_predicted"] for found in member["traffic"].values())
    return report


def message_tables(text: str) -> list[list[str]]:
    """The planned and the counted messages of a report, with the headings."""
    section = text[text.index("messages and bytes per step and rank") :].partition("\n\n")[0]
    both = section.partition("  counted in a step\n")[::2]
    return [[line for line in part.splitlines() if re.match(r"  (stage|\d)", line)] for part in both]


@pytest.mark.slow
@pytest.mark.distributed
def test_tensor_parallel_under_the_launcher(folder: Path, tmp_path: Path) -> None:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    flags = ["--tensor_parallel=2", "--recompute=selective", f"--json={tmp_path / 'bench.json'}"]
    command = [*launcher, str(TOOL), f"--model={folder / 'model'}", *SHARED, *flags]
    ended = start_command(command, folder=tmp_path).wait().expect(0)
    report = report_of(tmp_path)
    assert all(head in ended.outputs[0] for head in (*TABLE_HEADS, VERDICT))
    assert report["layout"]["tensor_parallel"] == 2 and report["layout"]["sequence_parallel"]
    assert report["weights"] == "read" and report["micro_batches"] == 1
    assert report["tokens"] == report["positions"] == 2 * 64 and report["supervised"] == 64
    for member in report["ranks"]:
        assert set(member["traffic"]) == {"tensor", "model", "world"} and member["stage"] == 0


@pytest.mark.distributed
def test_pipeline_of_random_weights(folder: Path, tmp_path: Path) -> None:
    """A shape without weights, cut into stages: twice as many micro-batches as stages. The step is planned, too."""
    flags = ("--pipeline_parallel=2", "--random_weights")
    constants = CPU.changed({"step": Constant(1000.0, "a test")}, name="slow", title="slow CPU")
    (tmp_path / "constants.json").write_text(json.dumps(constants.record()))
    planned = f"--constants={tmp_path / 'constants.json'}"
    ended = bench(folder, tmp_path, *flags, planned, ranks=2, model="shape").expect(0)
    report = report_of(tmp_path)
    values = {"rows": 2, "length": 64, "dtype": "fp32", "rank": 3, "compile": "false", "pipeline_parallel": 2}
    settings = validate_settings({**values, "model": str(folder / "shape"), "random_weights": True}, BenchSettings)
    plan = plan_benchmark(settings, world_size=2)
    row = np.arange(64) >= 32
    batches = [shared_shape(plan.layout, [(0, [row, row])])._replace(lengths=(64, 64))] * 4
    (seconds,) = step_seconds([step_parts(plan.stages, batches, Links(plan.layout, 2), constants)])
    assert report["planned"]["seconds"] == pytest.approx(seconds._asdict()) and seconds.outside == 1000
    for member, stage in zip(report["ranks"], plan.stages, strict=True):
        memory = stage_memory(stage, tokens=2 * 64, documents=2, longest=64, machine=constants)
        assert member["planned_peak"] == memory.allocated + constants["context"]
    assert "speed on slow, planned and not measured" in ended.outputs[0]
    assert f"; the planned time is {seconds.total / median(report['seconds']):.3f} of it" in ended.outputs[0]
    planned, counted = message_tables(ended.outputs[0])
    assert planned == counted and counted[0].split()[:2] == ["stage", "pipeline"], "below the same headings"
    assert report["weights"] == "random" and report["micro_batches"] == 4
    assert report["tokens"] == 4 * 2 * 64
    assert [member["stage"] for member in report["ranks"]] == [0, 1]
    for member in report["ranks"]:
        assert set(member["traffic"]) == {"pipeline", "tied", "model", "world"}
        assert member["traffic"]["tied"]["messages"] == 1


@pytest.mark.distributed
def test_real_samples_on_data_parallel_ranks(folder: Path, tmp_path: Path) -> None:
    """Packed; ZeRO-3 leaves kept bytes unsaid, and what it fetches is not compared."""
    real = ("--task=custom", f"--train_file={folder / 'train.jsonl'}", "--samples=16", "--ds_config=zero3.json")
    bench(folder, tmp_path, *real, "--recompute=full", ranks=2).expect(0)
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["layout"]["packing"] and report["layout"]["data_parallel"] == 2
    assert report["tokens"] < report["positions"] and report["as_predicted"]
    for member in report["ranks"]:
        assert set(member["traffic"]) == {"data", "world"} and member["saved"] is None


@pytest.mark.distributed
def test_one_rank_with_an_engine(folder: Path, tmp_path: Path) -> None:
    """Any flag of a layout asks for the engine; without a launcher too."""
    arguments = [f"--model={folder / 'model'}", *SHARED, "--micro_batches=3", f"--json={tmp_path / 'bench.json'}"]
    ended = run_ranks(arguments, folder=tmp_path, script=TOOL).expect(0)
    report = report_of(tmp_path)
    assert report["micro_batches"] == 3 and report["ranks"][0]["traffic"] == {}
    assert "  none: one rank sends nothing" in ended.outputs[0]


@pytest.mark.distributed
def test_every_rank_refuses_in_one_line(folder: Path, tmp_path: Path) -> None:
    line = bench(folder, tmp_path, "--constants=none.json", ranks=2).expect(2).error_line()
    assert "none.json: no such file; expected a file of constants" in line
    assert not (tmp_path / "bench.json").exists()


def test_a_difference_of_kinds_is_seen() -> None:
    """Equal sums of a group are not enough; of the data-parallel group the bytes count, up to a bound."""
    counted, predicted = Traffic(), Traffic()
    counted.add(TENSOR, "all-reduce", 8, count=2)
    predicted.add(TENSOR, "all-gather", 8, count=2)
    counted.add(DATA, "all-reduce", 4)
    compared = compare_traffic(counted, predicted, 4)
    assert compared[TENSOR]["verdict"] == "differs: +0 messages, +0 B" and not compared[TENSOR]["as_predicted"]
    assert compared[DATA]["verdict"] == "as predicted" and compared[DATA]["predicted_messages"] is None
    assert compare_traffic(counted, predicted, 3)[DATA]["verdict"] == "differs: +1 B"
    assert compare_traffic(counted, counted, 4)[TENSOR]["verdict"] == "as predicted"


def test_a_rank_that_sends_something_else_is_named() -> None:
    """Below what was planned: each group of the first rank of a stage, and the ranks of all. What a stage does not have
    is left empty."""
    words = {"model": "llama2-7b", "num_layers": 2, "pipeline_parallel": 2, "rows": 1, "length": 16, "dtype": "bf16"}
    plan = plan_benchmark(validate_settings(words, BenchSettings), world_size=2)
    planned = Planned(step=StepPlan({ONLY: plan}), layout=plan.layout, machine=CPU)
    ranks: list[dict[str, Any]] = []
    for stage in (0, 1):
        predicted, counted = (planned.traffic(stage, of_engine=False) for _ in range(2))
        counted.add(WORLD, "all-reduce", 8, count=stage)
        traffic = compare_traffic(counted, predicted, 0)
        figures = {"saved": 2e6 if stage else None, "saved_formula": 1e6, "held": 3e6, "peak": None}
        as_predicted = all(found["as_predicted"] for found in traffic.values())
        numbers = {"number": stage, "stage": stage, "planned_peak": None, "as_predicted": as_predicted}
        ranks.append({**figures, **numbers, "traffic": traffic})
    about = {"model": "m", "method": "tl6", "targets": ("qkv",), "dtype": "bf16", "device": "CPU", "threads": 1}
    about |= {"allocator": "default malloc", "torch": "2", "versions": {}, "kernels": "not compiled", "planned": None}
    step = {"tokens": 64, "positions": 64, "supervised": 32, "micro_batches": 4, "seconds": [2.0], "model_flops": 4e9}
    step |= {"matmul_flops_per_second": 8e9, "weights": "random", "layout": {"recompute": "none"}, "ranks": ranks}
    text = "\n".join(report_lines({**about, **step}, planned))
    memory, messages = text.split("\n\n")[2:]
    assert [line.split() for line in memory.splitlines()[-2:]] == [
        ["0", "1.00", "MB", "3.00", "MB"],
        ["1", "2.00", "MB", "1.00", "MB", "2.000", "3.00", "MB"],
    ]
    *_, first, second, verdict = messages.splitlines()
    assert first.startswith("  0 ") and first.endswith("1 / 56 B")
    assert second.startswith("  1 ") and second.endswith("2 / 64 B, differs: +1 messages, +8 B")
    assert verdict == "  NOT as predicted: rank 1; --json has each rank's figures"


def test_the_allocator_is_named() -> None:
    assert describe_allocator({}) == "default malloc"
    asked = {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2", "MALLOC_CONF": "dirty_decay_ms:-1"}
    assert describe_allocator(asked) == "LD_PRELOAD libjemalloc.so.2, MALLOC_CONF dirty_decay_ms:-1"


KERNELS = {
    "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "matmul",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "matmul",
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_tn": "matmul",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>": "matmul",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>": "matmul",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128, 16, 4, 4, false>": "matmul",
    "triton_tem_fused_mm_3": "matmul",
    "void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t>>": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3": "attention",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": "communication",
    "ncclKernel_AllGather_RING_LL_Sum_int8_t": "communication",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memset (Device)": "copies",
    "triton_poi_fused_add_mul_silu_2": "elementwise",
    "triton_red_fused__scaled_dot_product_flash_attention_mm_1": "elementwise",
    "triton_per_fused_mean_rsqrt_0": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>": "elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "elementwise",
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false, false>": "elementwise",
    "void at_cuda_detail::cub::DeviceSelectSweepKernel<>": "other",
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_by_their_names(name: str) -> None:
    assert kernel_class(name) == KERNELS[name] and KERNELS[name] in CLASSES


@pytest.mark.gpu
def test_report_of_a_gpu(folder: Path, tmp_path: Path) -> None:
    """MFU and time by class of kernels, in one process and with an engine."""
    environment = {name: value for name, value in {**os.environ, **ENVIRONMENT}.items() if name != "DS_ACCELERATOR"}
    for flags in ((), ("--micro_batches=2",)):
        arguments = [f"--model={folder / 'model'}", *SHARED, *flags, f"--json={tmp_path / 'bench.json'}"]
        command = [sys.executable, str(TOOL), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
        assert done.returncode == 0 and "MFU" in done.stdout, done.stderr
        report = json.loads((tmp_path / "bench.json").read_text())
        figures = report if flags else report["sides"]["megatron_tiedlora"]
        assert figures["mfu"] > 0 and figures["kernel_seconds"]["matmul"] > 0


@pytest.mark.gpu
def test_time_of_kernels_on_a_gpu() -> None:
    import torch

    matrix = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    spent = kernel_seconds(lambda: (matrix @ matrix).add_(1))
    assert set(spent) == set(CLASSES) and spent["matmul"] > 0 and spent["elementwise"] > 0
    assert spent["attention"] == spent["communication"] == 0


# What is refused, and what is measured with which flags -------------------------------------------------------------


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
    ("--supervised=0.5 --task=gsm8k", "or remove --task"),
    ("--samples=8", "--samples 8 needs --task"),
    ("--padded_rows=8 --against=peft", "--padded_rows 8 needs --task"),
    ("--padded_rows=8 --task=gsm8k", "--padded_rows 8 needs --against peft"),
    ("--task=gsm8k --against=peft --padded_rows=5", "--samples 32 is not a multiple of --padded_rows 5"),
    ("--num_layers=2", "--num_layers 2 needs random weights"),
    ("--task=gsm8k --samples=10", "--samples 10 is not a multiple of --rows 4"),
    ("--random_weights --task=gsm8k", "has random weights"),
    ("--model=llama2-7b --task=gsm8k", "has random weights"),
    ("--recompute=some", "--recompute some: input should be 'none', 'selective' or 'full'"),
    ("--tensor_paralel=2", "did you mean --tensor_parallel"),
    # Adapters.
    ("--adapters=0", "--adapters 0: input should be greater than or equal to 1"),
    ("--adapters=2 --against=peft", "--adapters 2 is not implemented with --against; remove one"),
    ("--adapters=2 --task=gsm8k", "--adapters 2 is not implemented with --task; remove one"),
    ("--shared_tokens=64", "--shared_tokens 64 needs --adapters"),
    ("--adapters=2 --rows=2 --length=16 --shared_tokens=31", "--shared_tokens 31 is less than the micro-batch of one"),
    ("--adapters=2 --what=scaling", "--adapters 2 needs --what step, not scaling"),
    ("--adapters=2 --tensor_parallel=2", "--adapters 2 needs --what step, not layout"),
    # What is measured, and layouts.
    ("--against=peft --tensor_parallel=2", "--tensor_parallel 2 needs --what layout, not step"),
    ("--what=layout --against=peft", "--against peft needs --what step, not layout"),
    ("--what=scaling --packing=true", "--packing true needs --what layout, not scaling"),
    ("--what=decoding --rank=2", "--rank 2 needs --what step or layout or scaling or serving, not decoding"),
    ("--shares=1", "--shares 1 needs --what scaling, not step"),
    ("--what=all", "--what all: input should be 'step', 'layout', 'scaling', 'decoding' or 'serving'"),
    ("--micro_batches=0", "--micro_batches 0: input should be greater than or equal to 1"),
    ("--micro_batches=2 --task=gsm8k", "--micro_batches 2 is for made-up tokens; remove it, or remove --task"),
    ("--packing=true", "--packing true needs --task"),
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
    ("--adapters=2", "--adapters 2 needs a single process, not 2 ranks"),
    ("--against=peft", "--against peft needs a single process, not 2 ranks; start it without a launcher"),
    ("--what=scaling", "--what scaling needs a single process, not 2 ranks"),
    ("--what=decoding", "--what decoding needs a single process, not 2 ranks"),
    ("--tensor_parallel=3", "2 ranks are not a multiple of --tensor_parallel 3"),
    ("--pipeline_parallel=2 --ds_config=zero2.json --length=64", "ZeRO-2 cannot be used with --pipeline_parallel 2"),
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
    with pytest.raises(UserError, match=r"^--length 7: rows need at least 8 tokens"):
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
