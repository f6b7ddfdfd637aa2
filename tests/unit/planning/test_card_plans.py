"""What plans for cards say of storage formats and of kernels: traffic of rounding, the attention kernel, hints on both.

The bounds of the rates are those of an estimate by hand from launch counts and published speeds of kernels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.planned import H100, changed, searched, short
from support.run_helpers import write_rows
from support.tiny_models import write_tiny_model, write_tiny_tokenizer

from megatron_tiedlora.base.shapes import HeadShape, RopeShape
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.job_settings import parse_plan
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.model import fused_attention
from megatron_tiedlora.model.fused_attention import CANDIDATES, TILES, AttentionRoute, one_by_one
from megatron_tiedlora.parallel import kernels
from megatron_tiedlora.planning import machines, search
from megatron_tiedlora.planning.cluster_report import chosen_settings, hint_lines, plan_cluster
from megatron_tiedlora.planning.machines import ATTENTION, CPU, GPUS, Machine
from megatron_tiedlora.planning.search import Candidate, ClusterPlan
from megatron_tiedlora.planning.step_time import Seconds
from megatron_tiedlora.selfcheck import step_bench

FP8 = "--formats=fp8-products,fp8-transposed"
EAGER = changed(H100, round__forward=35.0, round__backward=49.0)  # bytes of uncompiled kernels


def fastest(model: str, layers: int, *flags: str, ranks: int = 1, machine: Machine = H100) -> Candidate:
    """The fastest layout of a model at 4,096 tokens."""
    given = ["--max_length=4096", "--global_batch_size=128", *flags]
    found = searched(*given, source=short(model, layers), ranks=ranks, machine=machine)
    return max((*found.rows, *found.elsewhere), key=lambda row: row.tokens_per_second)


# FP8 matmuls --------------------------------------------------------------------------------------------------------


def test_bytes_of_rounding_are_those_of_its_operations() -> None:
    """A compiled kernel reads its arguments and writes its results once."""
    rows, factors = torch.empty(1024, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(1, 4096, device="meta")
    forward, backward = kernels.round_rows(rows, 4096), kernels.round_scaled_rows(rows, factors)
    for touched, name in (((rows, *forward), "round.forward"), ((rows, factors, *backward), "round.backward")):
        assert sum(tensor.nbytes for tensor in touched) / rows.numel() == pytest.approx(H100[name], rel=0.01)


def test_fp8_matmuls_are_planned_as_they_are_written() -> None:
    """Rounding costs a few per cent; uncompiled kernels, which move 35 and 49 bytes, make them slower than bf16.

    Norms, gates and their gradients round what they write, for a byte a number.
    """
    seven, plain = fastest("llama2-7b", 32, FP8), fastest("llama2-7b", 32, "--formats=none")
    free = changed(H100, round__forward=0.0, round__backward=0.0)
    ratio = fastest("llama2-7b", 32, FP8, machine=free).tokens_per_second / seven.tokens_per_second
    assert 1.02 < ratio < 1.1 and seven.tokens_per_second > 1.15 * plain.tokens_per_second
    eager = fastest("llama2-7b", 32, FP8, "--compile=false", machine=EAGER)
    assert eager.tokens_per_second < plain.tokens_per_second


def test_70b_is_fastest_in_fp8() -> None:
    found = fastest("llama2-70b", 80, "--formats=none,fp8,fp8-products,fp8-transposed", ranks=8)
    assert found.storage.products == "fp8"


# Attention ----------------------------------------------------------------------------------------------------------


FA3, FA4, CUDNN, FA2, FLASH, _ = (candidate.name for candidate in CANDIDATES)
FA3_LINE = "pip install flash-attn-3 --extra-index-url https://download.pytorch.org/whl/cu130"


def on_this_computer(monkeypatch: pytest.MonkeyPatch, *installed: str, name: str = H100.title) -> None:
    """A GPU of this name, and these libraries and no other."""

    def find(module: str) -> ModuleSpec | None:
        return ModuleSpec(module, None, origin="x") if module in installed else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: f"NVIDIA {name}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: H100.capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(fused_attention, "find_spec", find)


def test_attention_is_that_of_a_default_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library's kernel, even if this computer, which has no such GPU, has one."""
    monkeypatch.setattr(fused_attention, "find_spec", lambda name: ModuleSpec(name, None, origin="x"))
    for card in GPUS.values():
        assert card.capability is not None
        name = FLASH if card.name in ("a100-80", "a800") else CUDNN
        assert machines.attention_of(machines.attending(card, head_dim=128, length=4096)) == name
        assert machines.attention_of(card) == machines.attention_kernel(card.capability) == name
    assert H100["attention.bf16"] == GPUS["h200"]["attention.bf16"] == 0.41
    assert "FlashAttention-3's paper, H100" in ATTENTION[9, 0][FA3].source
    assert machines.attention_of(changed(H100, attention__bf16=0.41)) is None  # measured: nobody knows by which kernel
    for other in (CPU, changed(H100, attention__bf16=0.41), H100.changed({"attention.bf16": ATTENTION[9, 0][FA3]})):
        assert machines.attending(other, head_dim=64, length=None) is other


def test_a_run_prefers_the_kernel_with_the_larger_share() -> None:
    """The order of the candidates and the table are one truth, and every kernel of the table can be chosen."""
    names = {candidate.name: candidate for candidate in CANDIDATES}
    assert set(ATTENTION) == {card.capability for card in GPUS.values()}
    for capability, shares in ATTENTION.items():
        *fused, last = shares
        assert fused == [name for name in names if name in shares] and last == TILES
        assert all(faster.value >= slower.value for faster, slower in pairwise(shares.values()))
        assert len(set(shares.values())) == len(shares), "a share and its source name the kernel"
        default = shares[machines.attention_kernel(capability)].value
        assert all(names[name].install for name, share in shares.items() if share.value > default), "one command"
        for kernel in fused:
            assert names[kernel].obstacle(capability, torch.bfloat16, 128, here=bool) is None


@pytest.mark.parametrize(
    ("installed", "head_dim", "length", "name"),
    [
        ((), 128, 4096, CUDNN),
        ((), 128, 4000, FLASH),  # no multiple of 128
        ((), 128, None, FLASH),  # packed samples
        ((), 256, 4096, FLASH),
        (("flash_attn",), 128, 4096, CUDNN),
        (("flash_attn",), 128, None, FA2),
        (("flash_attn_interface",), 256, None, FA3),
        (("flash_attn.cute",), 128, None, FA4),
        (("flash_attn.cute",), 256, None, FLASH),
    ],
)
def test_attention_is_that_of_the_model_and_of_this_computer(
    monkeypatch: pytest.MonkeyPatch, installed: Sequence[str], head_dim: int, length: int | None, name: str
) -> None:
    on_this_computer(monkeypatch, *installed)
    found = machines.attending(H100, head_dim=head_dim, length=length)
    assert machines.attention_of(found) == name and found["attention.bf16"] == ATTENTION[9, 0][name].value
    h200 = machines.attending(GPUS["h200"], head_dim=head_dim, length=length)  # which is elsewhere
    assert machines.attention_of(h200) == (CUDNN if head_dim == 128 and length == 4096 else FLASH)


@pytest.mark.parametrize(
    ("installed", "length", "given", "name", "in_windows"),
    [
        ((), 4096, {"window": 1024}, CUDNN, FLASH),  # which has windows
        ((), 1024, {"window": 1024}, CUDNN, None),  # no row is longer than the window
        ((), None, {"window": 1024}, FLASH, None),  # packed samples
        (("flash_attn_interface",), 4096, {"window": 1024}, FA3, None),
        (("flash_attn",), 4096, {"window": 1024}, CUDNN, FA2),
        ((), 4096, {"cap": 50.0}, TILES, None),
        (("flash_attn.cute",), 4096, {"cap": 50.0, "window": 1024}, TILES, None),
        (("flash_attn",), 4096, {"cap": 50.0, "window": 1024}, FA2, None),
    ],
)
def test_windows_and_caps_are_planned_by_the_kernels_that_have_them(
    monkeypatch: pytest.MonkeyPatch,
    installed: Sequence[str],
    length: int | None,
    given: dict[str, Any],
    name: str,
    in_windows: str | None,
) -> None:
    on_this_computer(monkeypatch, *installed)
    found = machines.attending(H100, head_dim=128, length=length, **given)
    assert machines.attention_of(found) == name
    assert found.windowed == (None if in_windows is None else ATTENTION[9, 0][in_windows])
    share = ATTENTION[9, 0][in_windows or name].value
    assert found.rate("attention", "bf16", windowed=True) == found["peak.bf16"] * share
    assert found.rate("attention", "fp32", windowed=True) == found.rate("attention", "fp32")
    faster = machines.faster_attention((10, 0), FLASH, head_dim=128, **given)
    assert (faster is None) == ("cap" in given), "FlashAttention 4 has windows, but no caps"


def test_an_old_cudnn_on_this_computer_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    on_this_computer(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert machines.attention_of(machines.attending(H100, head_dim=128, length=4096)) == FLASH


SMALL = ("--model=llama2-7b", "--max_length=4096", "--global_batch_size=4", "--gpus_per_node=1", "--formats=none")


def test_a_deterministic_run_is_planned_by_the_kernel_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by cuDNN, here or elsewhere, and in plans of a run and of a cluster."""
    for deterministic, name in ((True, FLASH), (False, CUDNN)):
        found = plan_cluster(parse_plan([*SMALL, f"--deterministic={deterministic}"]))
        step = found.candidates[0].step
        for machine in (found.machine, found.candidates[0].machine, step.shared.machine):
            assert machines.attention_of(machine) == name
    on_this_computer(monkeypatch)
    assert machines.attention_of(machines.attending(H100, head_dim=128, length=4096, deterministic=True)) == FLASH


def test_a_benchmark_of_several_documents_is_planned_as_packed_rows() -> None:
    for documents, name in ((20, FLASH), (1, CUDNN), (None, CUDNN)):
        values = {"model": "llama2-7b", "length": 4096, "documents": documents, "num_layers": 1}
        settings = validate_settings(values, BenchSettings)
        machine = step_bench.machine_of(step_bench.plan_benchmark(settings, dry_run=True, plan_for="gpu"), settings)
        assert machines.attention_of(machine) == name


@pytest.mark.parametrize(
    ("name", "known"),
    [("H100 80GB HBM3", "h100"), ("H100 PCIe", None), ("A800-SXM4-80GB", "a800"), ("H100 80GB HBM3 MIG 1g.10gb", None)],
)
def test_which_gpu_this_computer_has(monkeypatch: pytest.MonkeyPatch, name: str, known: str | None) -> None:
    on_this_computer(monkeypatch, name=name)
    assert [card.name for card in GPUS.values() if machines.is_here(card)] == ([] if known is None else [known])


def test_packed_samples_are_planned_by_the_kernel_that_takes_them(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny", vocab_size=320, max_positions=512)
    write_tiny_tokenizer(model, vocab_size=320)
    write_rows(tmp_path / "rows.jsonl", 24)
    flags = [f"--model={model}", "--max_length=128", "--global_batch_size=4", "--gpus_per_node=1", "--formats=none"]
    for more, name in (([], CUDNN), ([f"--train_file={tmp_path / 'rows.jsonl'}"], FLASH)):
        plan = plan_cluster(parse_plan([*flags, *more]))
        step = plan.candidates[0].step
        for machine in (plan.machine, plan.candidates[0].machine, step.shared.machine):
            assert machines.attention_of(machine) == name


def test_a_dry_run_names_its_attention_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", ["--model=llama2-7b", "--dry_run", "--gpu=h100"]) == 0
    text = capsys.readouterr().out
    assert f"\n  attention is planned by {CUDNN} (0.41 of the peak), which pip install of this project gives;" in text
    assert re.search(rf"with {FA3} \(0\.45; pip install .*\) each rank would do [\d,]+ tokens/s\n", text)


HEADS = HeadShape(32, 32, 128, RopeShape())
GPU, EXPECTED = torch.device("cuda:0"), "of the peak in bf16 is expected"


@pytest.mark.parametrize(
    ("route", "installed", "packing", "words"),
    [
        ((FA3, ""), (), True, "; 0.45 of the peak in bf16 is expected"),
        ((CUDNN, FLASH), (), False, f"; 0.41 {EXPECTED} (0.26 for other rows), and 0.45 with {FA3}: {FA3_LINE}"),
        ((CUDNN, FLASH), (), True, f"; 0.26 {EXPECTED}, and 0.45 with {FA3}: {FA3_LINE}"),
        ((FLASH, ""), ("flash_attn_interface",), False, "; 0.26 of the peak in bf16 is expected"),  # it does not run
        (("PyTorch's memory-efficient kernel", ""), (), False, ""),
    ],
)
def test_what_a_run_says_of_its_kernel(
    monkeypatch: pytest.MonkeyPatch, route: tuple[str, str], installed: Sequence[str], packing: bool, words: str
) -> None:
    on_this_computer(monkeypatch, *installed)
    chosen = AttentionRoute(route[0], "a reason", one_by_one, otherwise=route[1])
    assert machines.attention_in_words(chosen, GPU, heads=HEADS, packing=packing) == f"{chosen}{words}"
    assert machines.attention_in_words(chosen, torch.device("cpu"), heads=HEADS, packing=packing) == str(chosen)


# Storage formats ----------------------------------------------------------------------------------------------------


def planned(*flags: str, model: str = "llama2-7b", layers: int = 32, machine: Machine = H100) -> ClusterPlan:
    """A plan of one card at 4,096 tokens."""
    given = ("--max_length=4096", "--global_batch_size=8", *flags)
    return searched(*given, source=short(model, layers), ranks=1, machine=machine)


@pytest.mark.parametrize(
    ("flags", "formats"),
    [
        ((), {"none"}),
        (("--base=nf4",), {"nf4"}),
        (("--base=fp8",), {"fp8"}),
        (("--base=fp8", "--products=fp8"), {"fp8-products"}),
        (("--formats=nf4,fp8-products",), {"nf4", "fp8-products"}),
    ],
)
def test_only_formats_that_were_asked_for_are_ranked(flags: tuple[str, ...], formats: set[str]) -> None:
    """The others are priced, and named where they would gain; on this machine FP8 matmuls are the fastest."""
    plan = planned(*flags)
    assert {row.storage.name for row in plan.rows} == formats
    assert {row.storage.name for row in plan.elsewhere}.isdisjoint(formats)
    values = chosen_settings(plan, plan.rows[0])
    assert values.get("base") == plan.rows[0].storage.base
    names = [line.split()[0] for line in hint_lines(plan) if " would gain " in line]
    expected = {"none": ["fp8-transposed", "fp8-products"], "fp8": ["fp8-transposed", "fp8-products"]}
    assert names == expected.get(min(formats) if len(formats) == 1 else "", [])


def test_a_gain_is_that_of_the_fastest_layout_of_a_format() -> None:
    plan = planned()
    row = next(row for row in plan.elsewhere if row.storage.name == "fp8-products")
    gain = row.tokens_per_second / plan.rows[0].tokens_per_second - 1
    words = f"fp8-products would gain {gain:.0%} ({row.name}, {row.tokens_per_second:,.0f} tokens/s), but changes"
    (line,) = (line for line in hint_lines(plan) if line.startswith(words))
    assert gain > 0.2 and line.endswith("; --formats fp8-products takes it")
    assert not any(" would gain " in line for line in hint_lines(planned("--compile=false", machine=EAGER)))


def test_formats_are_equally_fast_within_half_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base that is changed least is then the first of them."""
    plan = planned("--formats=none,nf4,fp8-products")
    names = ("none", "nf4", "fp8-products")
    quick = {name: next(row for row in plan.rows if row.storage.name == name) for name in names}
    monkeypatch.setattr(search, "time_together", lambda _rows: None)  # the seconds are those that are set here
    for seconds, name in ((1.0, "none"), (1.004, "none"), (1.006, "nf4")):
        for other, its_own in zip(names, (seconds, 1.0, 0.9999), strict=True):
            quick[other].seconds = Seconds(its_own)
        assert replace(plan, candidates=tuple(quick.values())).rows[0].storage.name == name


def test_what_fits_in_another_format_only(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is started in a format that was not asked for; the status says that nothing fits."""
    assert call("plan", ["--model=llama2-70b", "--gpus_per_node=1"]) == 1
    text = capsys.readouterr().out
    assert "hint: nf4 would fit (t1p1d1-b1-zero0-selective-nf4, 1," in text and "\nstart" not in text
    assert "weights alone; --recompute full --base nf4 fits" in text
    assert call("plan", ["--model=llama2-70b", "--gpus_per_node=1", "--formats=nf4"]) == 0
    assert "\nstart t1p1d1-b1-zero0-selective-nf4\n" in capsys.readouterr().out


# Hints on kernels ---------------------------------------------------------------------------------------------------


def hint_on_attention(machine: Machine = H100) -> tuple[Candidate, str]:
    """The fastest layout of 7B in 16 bits, and the hint on its kernel."""
    plan = planned("--formats=none", machine=machine)
    (line,) = (line for line in hint_lines(plan) if line.startswith("attention"))
    return plan.rows[0], line


def test_a_plan_names_its_attention_kernel_and_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates are those of the same layout on a machine with the other constant."""
    best, line = hint_on_attention()
    faster = planned("--formats=none", machine=changed(H100, attention__bf16=0.45))
    rate = next(row for row in faster.rows if row.name == best.name).tokens_per_second
    assert line == (
        f"attention is planned by {CUDNN} (0.41 of the peak), which pip install of this project gives; with {FA3}"
        f" (0.45; {FA3_LINE}) {best.name} would do {rate:,.0f} tokens/s"
    )
    assert 1.01 < rate / best.tokens_per_second < 1.02
    default = f"attention is planned by {FLASH} (0.55 of the peak), which pip install of this project gives"
    assert hint_on_attention(GPUS["a100-80"])[1] == default
    assert f"; with {FA4} (0.45; pip install flash-attn-4) t1p1d1-" in hint_on_attention(GPUS["b200"])[1]
    on_this_computer(monkeypatch, "flash_attn_interface")
    assert hint_on_attention()[1] == f"attention is planned by {FA3} (0.45 of the peak), which this computer has"
