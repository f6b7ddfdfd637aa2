"""What plans for cards say of storage formats and of kernels: traffic of rounding, the attention kernel, hints on both.

The bounds of the rates are those of an estimate by hand from launch counts and published speeds of kernels.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest
import torch
from support.folders import ROOT
from support.planned import H100, changed, searched, short

from megatron_tiedlora.commands.front import call
from megatron_tiedlora.model import fused_attention
from megatron_tiedlora.model.fused_attention import CANDIDATES
from megatron_tiedlora.parallel import kernels
from megatron_tiedlora.planning import search
from megatron_tiedlora.planning.cluster_report import chosen_settings, hint_lines
from megatron_tiedlora.planning.machines import ATTENTION, GPUS, Machine, attention_of, default_attention
from megatron_tiedlora.planning.search import Candidate, ClusterPlan
from megatron_tiedlora.planning.step_time import Seconds

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
    """Rounding costs a few per cent; uncompiled kernels, which moved 35 and 49 bytes, made them slower than bf16."""
    seven, plain = fastest("llama2-7b", 32, FP8), fastest("llama2-7b", 32, "--formats=none")
    free = changed(H100, round__forward=0.0, round__backward=0.0)
    ratio = fastest("llama2-7b", 32, FP8, machine=free).tokens_per_second / seven.tokens_per_second
    assert 1.02 < ratio < 1.1 and seven.tokens_per_second > 1.15 * plain.tokens_per_second
    assert fastest("llama2-7b", 32, FP8, machine=EAGER).tokens_per_second < plain.tokens_per_second


def test_70b_is_fastest_in_fp8() -> None:
    found = fastest("llama2-70b", 80, "--formats=none,fp8,fp8-products,fp8-transposed", ranks=8)
    assert found.storage.products == "fp8"


# Attention ----------------------------------------------------------------------------------------------------------


def test_attention_is_that_of_a_default_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of the table is one that a run can choose. The default one is no library's, even if there is one."""
    monkeypatch.setattr(fused_attention, "find_spec", lambda name: ModuleSpec(name, None, origin="x"))
    names = {candidate.name: candidate for candidate in CANDIDATES}
    for card in GPUS.values():
        assert card.capability is not None
        name = attention_of(card)
        assert name == default_attention(card.capability) == "PyTorch's flash kernel"
        assert callable(names[name].kernel) and set(ATTENTION[card.capability]) <= set(names)
        for kernel in ATTENTION[card.capability]:
            assert names[kernel].obstacle(card.capability, torch.bfloat16, 128) is None
    assert H100["attention.bf16"] == GPUS["h200"]["attention.bf16"] == 0.26
    assert "FlashAttention-3's paper, H100" in H100.constants["attention.bf16"].source
    assert attention_of(changed(H100, attention__bf16=0.26)) is None  # measured: nobody knows by which kernel


def test_the_words_about_7b_are_those_of_its_plans() -> None:
    text = " ".join((ROOT / "docs" / "planning_log.md").read_text().split())
    plain = fastest("llama2-7b", 32, "--formats=none")
    faster = fastest("llama2-7b", 32, "--formats=none", machine=changed(H100, attention__bf16=0.45))
    rates = [f"{row.tokens_per_second:,.0f}" for row in (plain, faster, fastest("llama2-7b", 32, FP8))]
    assert f"7B on one card would do {rates[1]} tokens/s instead of {rates[0]}" in text
    assert f"7B on one card takes {rates[2]} tokens/s in fp8 and {rates[0]} in bf16" in text


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
    assert not any(" would gain " in line for line in hint_lines(planned(machine=EAGER)))


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


def test_a_plan_names_its_attention_kernel_and_the_faster_one() -> None:
    """The rates are those of the same layout on a machine with the other constant."""
    plan = planned("--formats=none")
    (line,) = (line for line in hint_lines(plan) if line.startswith("attention"))
    faster = planned("--formats=none", machine=changed(H100, attention__bf16=0.45))
    rate = next(row for row in faster.rows if row.name == plan.rows[0].name).tokens_per_second
    assert line == (
        "attention is planned by PyTorch's flash kernel, which a run uses unless another kernel is installed; with"
        f" FlashAttention 3 (docs/gpu.md) {plan.rows[0].name} would do {rate:,.0f} tokens/s"
    )
    assert rate > 1.08 * plan.rows[0].tokens_per_second
    equal = hint_lines(planned("--formats=none", machine=changed(H100, matmul__bf16=1e-4)))
    assert any(line.endswith("kernel, which a run uses unless another kernel is installed") for line in equal)
    other = hint_lines(planned("--formats=none", machine=GPUS["a100-80"]))
    assert any(line.endswith("kernel, which a run uses unless another kernel is installed") for line in other)
