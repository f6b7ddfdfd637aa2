"""tools/bench_step.py: both sides see the same samples, figures are there, and bad input is one line."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import write_uneven_data
from folders import ROOT
from quantised_folders import SHAPE, quantised_folder
from ranks import ENVIRONMENT
from run_helpers import Ended, start_command
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import precision_in_words
from megatron_tiedlora.benchmark.compare import OURS, PADDED, Side, make_sides, measure_sides
from megatron_tiedlora.benchmark.layout import plan_benchmark, saved_formula
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight

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


def sides_of(settings: BenchSettings) -> dict[str, Side]:
    """All sides, made."""
    return {name: make() for name, make in make_sides(plan_benchmark(settings), settings).items()}


def run_script(folder: Path, code: str) -> Ended:
    """A script in a process of its own with the C library's allocator."""
    script = folder / "script.py"
    script.write_text(code)
    command = ["env", "--unset=LD_PRELOAD", f"PYTHONPATH={TOOL.parents[1]}", sys.executable, str(script)]
    return start_command(command, folder=folder).wait()


def beside_the_formula(supervised: int, positions: int, *, itemsize: int) -> int:
    """Kept once: 8 numbers a position, the rotations of heads of 8, and 16 bytes a label for its places."""
    return 16 * supervised + 8 * itemsize * positions


def test_both_sides_train_on_the_same_tokens(folder: Path) -> None:
    """Packed or padded, the losses of the first step are equal: adapters start at zero on both sides."""
    real = (f"--train_file={folder / 'train.jsonl'}", "--task=custom", "--samples=16", "--length=128")
    for more in ((), real):
        made = sides_of(settings_of(folder, "--against=peft", "--compile=false", *more))
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
def test_what_a_step_keeps_is_the_formula_of_its_recompute(folder: Path, recompute: str) -> None:
    """But for what is there once; the table of rotations too is made again where layers are."""
    settings = settings_of(folder, f"--recompute={recompute}", "--length=256", "--compile=false")
    side = sides_of(settings)[OURS]
    beside = side.saved_bytes() - saved_formula(plan_benchmark(settings), side.batches)
    positions = 0 if recompute == "full" else side.num_positions
    assert beside == beside_the_formula(side.num_supervised, positions, itemsize=4)


def test_our_side_has_the_base_that_is_given(folder: Path) -> None:
    settings = settings_of(folder, "--base=nf4")
    (side,) = sides_of(settings).values()
    quantised = [weight for weight in frozen_weights(side.model).values() if isinstance(weight, QuantisedWeight)]
    assert len(quantised) == 4 * len(side.model.blocks) and quantised[0].storage.name == "nf4"
    assert precision_in_words(settings.dtype, settings.base) == "fp32 with the linears in nf4"


def test_the_format_of_a_quantised_folder_is_reported(tmp_path: Path) -> None:
    plain = write_tiny_model(tmp_path / "plain", **{**SHAPE, "num_layers": 1})
    quantised, _ = quantised_folder(plain, tmp_path / "nf4", "nf4")
    words = [f"--model={quantised}", "--dtype=fp32", "--length=16", "--compile=false", "--repeats=1"]
    assert measure_sides(parse_settings(words, BenchSettings))["dtype"] == "fp32 with the linears in nf4"


@pytest.mark.parametrize(
    ("wish", "said"), [("false", "not compiled"), pytest.param("true", "compiled in ", marks=pytest.mark.slow)]
)
def test_the_command_writes_its_figures(folder: Path, tmp_path: Path, wish: str, said: str) -> None:
    arguments = [f"--model={folder / 'model'}", "--against=peft", "--rows=2", "--length=64", "--repeats=1"]
    arguments.append(f"--compile={wish}")
    command = [sys.executable, str(TOOL), *arguments, f"--json={tmp_path / 'bench.json'}"]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"against {PADDED}: speed " in done.stdout
    report: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    ours, theirs = report["sides"][OURS], report["sides"][PADDED]
    assert ours["tokens"] == theirs["tokens"] == 128 and ours["supervised"] == 64
    assert 0 < ours["saved"] < theirs["saved"] and len(ours["seconds"]) == 1
    assert ours["model_flops"] > 0 and report["matmul_flops_per_second"] > 0
    assert ours["saved_ratio"] == ours["saved"] / ours["saved_formula"]
    assert ours["saved"] - ours["saved_formula"] == beside_the_formula(64, 128, itemsize=2)
    assert f"{OURS}: recompute none; kernels {report['kernels']}\n" in done.stdout
    assert report["kernels"].startswith(said)
    assert "saved_formula" not in theirs and "of the formula's" in done.stdout
    assert {"torch", "deepspeed", "peft"} <= set(report["versions"]) and report["allocator"] in done.stdout


@pytest.mark.parametrize(
    ("wish", "said"), [("false", "not compiled"), ("auto", "not compiled: TORCHDYNAMO_DISABLE is 1")]
)
def test_why_kernels_are_not_compiled_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wish: str, said: str
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert sides_of(settings_of(folder, f"--compile={wish}"))[OURS].kernels == said


def test_kernels_that_must_be_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UserError, match=r"^--compile true: TORCHDYNAMO_DISABLE is 1\. "):
        sides_of(settings_of(folder, "--compile=true"))


def test_random_weights_are_made_where_and_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are one on both sides. The other side's weights are in bf16 from the start, with no copy in fp32 before."""
    from transformers import LlamaForCausalLM

    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(PRESETS, "llama2-7b", {**PRESETS["llama2-7b"], **narrow, "vocab_size": 300})
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
from megatron_tiedlora.benchmark.timing import restart_peak
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
from megatron_tiedlora.benchmark.timing import in_own_process
from megatron_tiedlora.config.cli import run_command


def killed(_):
    os.kill(os.getpid(), signal.SIGKILL)


def measured(value):
    return value


def main(argv):
    assert in_own_process("PEFT LoRA", measured, 3) == 3
    in_own_process("PEFT LoRA", killed, 3)


if __name__ == "__main__":
    run_command(main, [])
""",
    )
    (said,) = ended.expect(2).errors
    assert said.startswith("error: PEFT LoRA: the process that measures its memory was ended") and said.count("\n") == 1
    assert "--rows, --length or --num_layers" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rows=0",), "--rows 0: input should be greater than or equal to 1"),
        (("--supervised=0",), "--supervised 0: input should be greater than 0"),
        (("--supervised=nan",), "--supervised nan: input should be a finite number"),
        (("--supervised=inf",), "--supervised inf: input should be a finite number"),
        (("--supervised=1.5",), "--supervised 1.5: input should be less than or equal to 1"),
        (("--length=1", "--supervised=1"), "--length 1: input should be greater than or equal to 2"),
        (("--length=8", "--documents=8"), "--supervised 0.5 with --length 8: no token has a label"),
        (("--length=16", "--supervised=0.01"), "--supervised 0.01 with --length 16: no token has a label"),
        (("--supervised=0.5", "--task=gsm8k"), "not with --task"),
        (("--samples=8",), "--samples 8 goes with --task"),
        (("--padded_rows=8", "--against=peft"), "--padded_rows 8 goes with --task"),
        (("--padded_rows=8", "--task=gsm8k"), "--padded_rows 8 goes with --against peft"),
        (("--task=gsm8k", "--against=peft", "--padded_rows=5"), "--samples 32 is not a multiple of --padded_rows 5"),
        (("--num_layers=2",), "--num_layers 2 goes with a preset"),
        (("--task=gsm8k", "--samples=10"), "--samples 10 is not a multiple of --rows 4"),
    ],
)
def test_bad_input_is_one_line(folder: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan_benchmark(settings_of(folder, *more))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_both_sides_adapt_the_targets(folder: Path) -> None:
    for flags, modules in (((), "q_proj k_proj v_proj"), (("--targets=down_proj,o_proj",), "o_proj down_proj")):
        settings = settings_of(folder, "--against=peft", *flags)
        assert [target.name for target in plan_benchmark(settings).adapter.targets] == list(settings.targets)
        peft = make_sides(plan_benchmark(settings), settings)[PADDED]().model
        adapted = {name.split(".")[-1] for name, module in peft.named_modules() if hasattr(module, "lora_A")}
        assert adapted == set(modules.split())


def test_labels_of_a_row_by_hand() -> None:
    """The first token has none that counts."""
    rows = ((2, 1.0), (2, 0.5), (16, 0.5), (16, 1.0))
    settings = [BenchSettings(what="step", length=length, supervised=share) for length, share in rows]
    assert [one.labels for one in settings] == [1, 1, 8, 15]
