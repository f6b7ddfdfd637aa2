"""tools/bench_step.py: all sides see the same samples and take the same steps, and figures are there."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_runs import write_uneven_data
from support.folders import ROOT
from support.quantised_models import SHAPE, quantised_folder
from support.run_helpers import Ended, start_command
from support.tiny_models import FAMILY_MODELS, write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import precision_in_words
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight
from megatron_tiedlora.selfcheck import compare
from megatron_tiedlora.selfcheck.bench_report import report_lines
from megatron_tiedlora.selfcheck.step_bench import plan_benchmark, planned_saved_bytes

TOOL = ROOT / "tools" / "bench_step.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its training rows."""
    folder = tmp_path_factory.mktemp("bench")
    write_tiny_model(folder / "model")
    write_uneven_data(folder / "train.jsonl")
    return folder


def settings_of(folder: Path, *more: str) -> BenchSettings:
    """The command's settings."""
    return parse_settings([f"--model={folder / 'model'}", "--dtype=fp32", "--length=64", *more], BenchSettings)


def sides_of(settings: BenchSettings) -> dict[str, compare.Side]:
    """All sides, made."""
    return {name: make() for name, make in compare.make_sides(plan_benchmark(settings), settings).items()}


def run_script(folder: Path, code: str) -> Ended:
    """A script in a process of its own with the C library's allocator."""
    script = folder / "script.py"
    script.write_text(code)
    command = ["env", "--unset=LD_PRELOAD", f"PYTHONPATH={TOOL.parents[1]}", sys.executable, str(script)]
    return start_command(command, folder=folder).wait()


def measured_here(_: str, measure: Callable[..., Any], *given: Any) -> Any:
    """In place of `in_own_process`, whose imports take seconds."""
    return measure(*given)


def beside_the_plan(supervised: int, positions: int, *, itemsize: int) -> int:
    """Kept once: 8 numbers a position, the rotations of heads of 8, and 16 bytes a label for its places."""
    return 16 * supervised + 8 * itemsize * positions


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_both_sides_train_on_the_same_tokens(folder: Path, tmp_path: Path, family: str) -> None:
    """Packed or padded, the losses of the first step are equal: adapters start at zero on both sides.

    So they are with windows that are shorter than samples, and where transformers computes scores itself.
    """
    write_tiny_model(tmp_path / "model", **FAMILY_MODELS.get(family, {}))
    real = (f"--train_file={folder / 'train.jsonl'}", "--task=custom", "--samples=16", "--length=128")
    for more in ((), real):
        made = sides_of(settings_of(tmp_path, "--against=peft", "--compile=false", *more))
        assert len(made) == (3 if more else 2)
        assert len({(side.num_tokens, side.num_supervised) for side in made.values()}) == 1
        losses = [sum(float(side.forward(batch).detach()) for batch in side.batches) for side in made.values()]
        assert max(losses) - min(losses) <= 1e-5 * max(losses)
        for side in made.values():
            trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
            before = [parameter.detach().clone() for parameter in trained]
            side.step()
            assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    padding = {name: side.num_positions / side.num_tokens for name, side in made.items()}
    ours, padded, packed = padding.values()
    assert ours == packed < padded


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_a_step_keeps_is_planned_for_its_recompute(folder: Path, recompute: str) -> None:
    """But for what is there once; the table of rotations too is made again where layers are."""
    settings = settings_of(folder, f"--recompute={recompute}", "--length=256", "--compile=false")
    side = sides_of(settings)[compare.OURS]
    beside = side.saved_bytes() - planned_saved_bytes(plan_benchmark(settings), side.batches)
    positions = 0 if recompute == "full" else side.num_positions
    assert beside == beside_the_plan(side.num_supervised, positions, itemsize=4)


def test_our_side_has_the_base_that_is_given(folder: Path) -> None:
    settings = settings_of(folder, "--base=nf4", "--compile=false")
    (side,) = sides_of(settings).values()
    quantised = [weight for weight in frozen_weights(side.model).values() if isinstance(weight, QuantisedWeight)]
    assert len(quantised) == 4 * len(side.model.blocks) and quantised[0].storage.name == "nf4"
    assert precision_in_words(settings.dtype, settings.base) == "fp32 with the linears in nf4"


def test_the_format_of_a_quantised_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.timing, "in_own_process", measured_here)
    plain = write_tiny_model(tmp_path / "plain", **{**SHAPE, "num_layers": 1})
    quantised, _ = quantised_folder(plain, tmp_path / "nf4", "nf4")
    words = [f"--model={quantised}", "--dtype=fp32", "--length=16", "--compile=false", "--repeats=1"]
    assert compare.measure_sides(parse_settings(words, BenchSettings))["dtype"] == "fp32 with the linears in nf4"


@pytest.mark.parametrize(
    ("wish", "said"), [("false", "not compiled"), pytest.param("true", "compiled in ", marks=pytest.mark.slow)]
)
def test_the_command_writes_its_figures(
    folder: Path,
    tmp_path: Path,
    wish: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The memory of our side is measured in a process of its own."""
    in_process = compare.timing.in_own_process
    monkeypatch.setattr(
        compare.timing,
        "in_own_process",
        lambda name, *given: (in_process if name == compare.OURS else measured_here)(name, *given),
    )
    arguments = [f"--model={folder / 'model'}", "--against=peft", "--rows=2", "--length=64", "--repeats=1"]
    assert call("bench", [*arguments, f"--compile={wish}", f"--json={tmp_path / 'bench.json'}"]) == 0
    printed = capsys.readouterr().out
    assert f"against {compare.PADDED}: speed " in printed
    report: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    ours, theirs = report["sides"][compare.OURS], report["sides"][compare.PADDED]
    assert ours["tokens"] == theirs["tokens"] == 128 and ours["supervised"] == 64
    assert 0 < ours["saved"] < theirs["saved"] and len(ours["seconds"]) == 1
    assert ours["model_flops"] > 0 and report["matmul_flops_per_second"] > 0
    assert ours["saved_ratio"] == ours["saved"] / ours["saved_formula"]
    assert ours["saved"] - ours["saved_formula"] == beside_the_plan(64, 128, itemsize=2)
    assert f"{compare.OURS}: recompute none; kernels {report['kernels']}\n" in printed
    assert report["kernels"].startswith(said)
    assert "saved_formula" not in theirs and "of the planned ones" in printed
    assert {"torch", "deepspeed", "peft"} <= set(report["versions"]) and report["allocator"] in printed


def test_why_kernels_are_not_compiled_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they must be."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    for wish, said in (("false", "not compiled"), ("auto", "not compiled: TORCHDYNAMO_DISABLE is 1")):
        assert sides_of(settings_of(folder, f"--compile={wish}"))[compare.OURS].kernels == said
    with pytest.raises(UserError, match=r"^--compile true: TORCHDYNAMO_DISABLE is 1\. "):
        sides_of(settings_of(folder, "--compile=true"))


def test_random_weights_are_made_where_and_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are one on both sides. The other side's weights are in bf16 from the start, with no copy in fp32 before."""
    from transformers import LlamaForCausalLM

    monkeypatch.setitem(PRESETS, "llama2-7b", {**PRESETS["llama2-7b"], **NARROW, "vocab_size": 300})
    made, finish = [], LlamaForCausalLM.post_init

    def watched(model: Any) -> None:
        made.extend(parameter.dtype for parameter in model.parameters())
        finish(model)

    monkeypatch.setattr(LlamaForCausalLM, "post_init", watched)
    flags = ["--model=llama2-7b", "--num_layers=1", "--rows=1", "--length=16", "--against=peft", "--compile=false"]
    for side in sides_of(parse_settings(flags, BenchSettings)).values():
        frozen = {name: p for name, p in side.model.named_parameters() if not p.requires_grad}
        assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}
        norms = [parameter for parameter in frozen.values() if parameter.ndim == 1]
        assert len(norms) == 3 and all(bool((norm == 1).all()) for norm in norms)
        assert all(float(p.float().std()) > 0.01 for p in frozen.values() if p.ndim == 2)
    assert set(made) == {torch.bfloat16} and torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc on Linux"
)
def test_a_peak_counts_memory_that_was_free_before(tmp_path: Path) -> None:
    """100 MB that an allocator keeps, as below a block still in use, are no part of what is held at the start."""
    ended = run_script(
        tmp_path,
        """
import torch
from megatron_tiedlora.selfcheck.timing import restart_peak
from megatron_tiedlora.training.throughput import peak_memory_bytes


def fill():
    return [bytearray(b"x" * 50_000) for _ in range(2_000)]


blocks = fill()
last = blocks[-1]
del blocks
before = restart_peak(torch.device("cpu"))
blocks = fill()
print(None if before is None else peak_memory_bytes(torch.device("cpu")) - before)
""",
    )
    (printed,) = ended.expect(0).outputs
    if printed.strip() == "None":
        pytest.skip("peaks cannot be started again here")
    assert int(printed) > 95e6


def test_a_process_that_is_killed_is_one_line(tmp_path: Path) -> None:
    """As by a system without memory left: no waiting for ever, no traceback, and no warning of what is left behind."""
    ended = run_script(
        tmp_path,
        """
import os
import signal
from megatron_tiedlora.selfcheck.timing import in_own_process
from megatron_tiedlora.config.cli import run_command


def killed(_):
    os.kill(os.getpid(), signal.SIGKILL)


def main(argv):
    in_own_process("PEFT LoRA", killed, 3)


if __name__ == "__main__":
    run_command(main, [])
""",
    )
    (said,) = ended.expect(2).errors
    assert said.startswith("error: PEFT LoRA: the process that measures it was ended") and said.count("\n") == 1
    assert "--rows, --length or --num_layers" in said


def test_both_sides_adapt_the_targets(folder: Path) -> None:
    for flags, modules in (((), "q_proj k_proj v_proj"), (("--targets=down_proj,o_proj",), "o_proj down_proj")):
        settings = settings_of(folder, "--against=peft", *flags)
        assert [target.name for target in plan_benchmark(settings).adapter.targets] == list(settings.targets)
        peft = compare.make_sides(plan_benchmark(settings), settings)[compare.PADDED]().model
        adapted = {name.split(".")[-1] for name, module in peft.named_modules() if hasattr(module, "lora_A")}
        assert adapted == set(modules.split())


# Several adapters in turn, together, and one with as many tokens ------------------------------------------------------

SHORT = ("--dtype=bf16", "--rows=2", "--length=16", "--compile=false", "--repeats=1")


def sides_of_short(folder: Path, *more: str) -> dict[str, compare.Side]:
    return sides_of(settings_of(folder, *SHORT, *more))


def tensors_of(side: compare.Side) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in side.model.adapter_group.named_parameters()}


def tensors_after(side: compare.Side) -> dict[str, torch.Tensor]:
    for _ in range(2):
        side.step()
    return tensors_of(side)


@pytest.mark.parametrize(("more", "micro_batches"), [((), 1), (("--shared_tokens=80",), 2)])
def test_adapters_take_the_same_steps_in_turn_and_together(
    folder: Path, more: tuple[str, ...], micro_batches: int
) -> None:
    """So that their times are those of the same work: every tensor of every adapter has the same bits afterwards."""
    alone, together = (sides_of_short(folder, "--adapters=3", *more) for _ in range(2))
    assert len(together[compare.TOGETHER].batches) == len(together[compare.ONE].batches) == micro_batches
    assert len(alone[compare.IN_TURN].batches) == 3
    before = {name: tensor.clone() for name, tensor in tensors_of(alone[compare.IN_TURN]).items()}
    expected, found = tensors_after(alone[compare.IN_TURN]), tensors_after(together[compare.TOGETHER])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = {name.split(".")[0] for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert changed == {"adapter 0", "adapter 1", "adapter 2"}


def test_the_third_side_has_as_many_tokens_of_one_adapter(folder: Path) -> None:
    side = sides_of_short(folder, "--adapters=3")[compare.ONE]
    assert [batch.tokens.shape for batch in side.batches] == [(6, 16)]
    before = {name: tensor.clone() for name, tensor in tensors_of(side).items()}
    after = tensors_after(side)
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"adapter 0"}


def test_the_command_writes_the_figures_of_adapters(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.timing, "in_own_process", measured_here)
    file = tmp_path / "bench.json"
    assert call("bench", [f"--model={folder / 'model'}", *SHORT, "--adapters=2", f"--json={file}"]) == 0
    printed = capsys.readouterr().out
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["tokens"] == 2 * 2 * 16 and report["micro_batches"] == 1
    assert list(report["sides"]) == [compare.IN_TURN, compare.TOGETHER, compare.ONE]
    assert all(len(side["seconds"]) == 1 and side["peak"] != 0 for side in report["sides"].values())
    middle = {name: side["seconds"][0] for name, side in report["sides"].items()}
    assert report["ratio"] == middle[compare.IN_TURN] / middle[compare.TOGETHER]
    assert f"together against in turn {report['ratio']:.2f}" in printed
    assert "2 x 16 tokens an adapter and step; together in 1 micro-batch\n" in printed and "load " in printed


# --what scaling and --what decoding, and the tables of every --what ---------------------------------------------------

NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SETUP = {"device": "CPU", "threads": 2, "allocator": "default malloc", "torch": "2", "versions": {}}


def test_a_table_for_each_quantity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PRESETS, "llama2-7b", {**PRESETS["llama2-7b"], **NARROW, "vocab_size": 300})
    values = ["--layers=1,3", "--lengths=8,24", "--ranks=2", "--shares="]
    assert call("bench", ["--what=scaling", "--length=16", "--compile=false", "--repeats=1", *values]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, _, rest = lines[0].partition(" on CPU")  # and its name
    assert first == "llama2-7b, tl6 of qkv, bf16" and rest.endswith("; kernels not compiled")
    heads = [index for index, line in enumerate(lines) if "tokens/s" in line]
    assert [lines[index].split()[0] for index in heads] == ["num_layers", "length", "rank"]
    assert [line.split()[:2] for line in lines[heads[0] + 1 : heads[1]]] == [["1", "16"], ["3", "16"]]
    assert [line.split()[:2] for line in lines[heads[1] + 1 : heads[2]]] == [["8", "8"], ["24", "24"]]


def test_table_by_hand() -> None:
    measured = [
        {"value": 2, "tokens": 100, "seconds": [2.0, 1.0, 3.0]},
        {"value": 10, "tokens": 100, "seconds": [4.0, 4.0, 4.0]},
    ]
    about = {"model": "m", "method": "tl6", "targets": ("qkv",), "dtype": "bf16", "kernels": "not compiled", **SETUP}
    lines = report_lines({**about, "axes": {"rank": measured}})
    assert lines[3].split() == ["2", "100", "2.000", "1.000", "3.000", "50.0"]
    assert lines[4].split() == ["10", "100", "4.000", "4.000", "4.000", "25.0", "0.2500"]


def test_tables_of_sides_by_hand() -> None:
    """Every column under its header; a figure that a side does not have is left empty."""
    about = {"model": "m", "method": "tl6", "targets": ("qkv", "o_proj"), "rank": 8, "dtype": "bf16", **SETUP}
    about |= {"recompute": "none", "kernels": "not compiled"}
    ours = {"seconds": [2.0, 1.0, 4.0], "tokens": 90, "positions": 100, "model_flops": 4e9, "saved": 5e6, "peak": 7e6}
    theirs = {**ours, "seconds": [4.0], "model_flops": None, "saved": 2e7, "peak": None}
    sides = {"ours": {**ours, "saved_formula": 4e6, "saved_ratio": 1.25}, "theirs": theirs}
    assert report_lines({**about, "matmul_flops_per_second": 8e9, "sides": sides}) == [
        "m, tl6 r 8 of qkv, o_proj, bf16 on CPU; a bare matmul does 8 GFLOP/s",
        "threads a process: 2, default malloc, torch 2, deepspeed not installed",
        "ours: recompute none; kernels not compiled",
        "        seconds  least   most  tokens/s  padding  of matmul  saved MB  planned  peak MB",
        "ours      2.000  1.000  4.000      45.0    10.0%      25.0%       5.0      4.0      7.0",
        "theirs    4.000  4.000  4.000      22.5    10.0%                 20.0",
        "saved bytes are 1.250 of the planned ones",
        "against theirs: speed 2.00, saved bytes 0.250, peak ",
    ]
    about |= {"adapters": 2, "rows": 2, "length": 16, "micro_batches": 1, "tokens": 64, "load": [1.0, 2.0]}
    sides = {"in turn": {"seconds": [2.0], "peak": 7e6}, "together": {"seconds": [1.0], "peak": None}}
    assert report_lines({**about, "ratio": 2.0, "of_one_adapter": 0.5, "sides": sides}) == [
        "m, 2 adapters, tl6 r 8 of qkv, o_proj, bf16 on CPU; recompute none; kernels not compiled",
        "threads a process: 2, default malloc, torch 2, deepspeed not installed, load 1.0 to 2.0",
        "2 x 16 tokens an adapter and step; together in 1 micro-batch",
        "          seconds  least   most  tokens/s  peak MB",
        "in turn     2.000  2.000  2.000      32.0      7.0",
        "together    1.000  1.000  1.000      64.0",
        "together against in turn 2.00, against one adapter with all tokens 0.50",
    ]


def test_decoding_by_hand() -> None:
    assert compare.share_of_equal_tokens([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 7, 6]]) == 4 / 6
    about = {"model": "m", "dtype": "fp32", "batch_size": 2, "prompt_tokens": 9, "new_tokens": 4, "equal_tokens": 0.5}
    lines = report_lines({**about, **SETUP, "seconds": {"here": [2.0, 1.0, 4.0], "there": [3.0, 3.0, 3.0]}})
    assert lines[0] == "m in fp32 on CPU: 2 prompts of 9 tokens together, 4 new tokens each, 50.0% of them equal"
    assert lines[3].split() == ["here", "2.000", "1.000", "4.000", "4.0"]
    assert lines[-1] == "ratio of the medians 1.50"
