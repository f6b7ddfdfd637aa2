"""bench_step.py --what scaling and --what decoding, and the tables of every --what; bad input is one line."""

from __future__ import annotations

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.benchmark.compare import measure_sides, share_of_equal_tokens
from megatron_tiedlora.benchmark.report import report_lines
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.presets import PRESETS

NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SETUP = {"device": "CPU", "threads": 2, "allocator": "default malloc", "torch": "2", "versions": {}}


def test_a_table_for_each_quantity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PRESETS, "llama2-7b", {**PRESETS["llama2-7b"], **NARROW, "vocab_size": 300})
    values = ["--layers=1,3", "--lengths=8,24", "--ranks=2", "--shares="]
    assert call("bench", ["--what=scaling", "--length=16", "--compile=false", "--repeats=1", *values]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama2-7b, tl6 of qkv, bf16 on CPU; kernels not compiled"
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
        "                      seconds   least    most  tokens/s  padding  of matmul  saved MB  formula  peak MB",
        "ours                    2.000   1.000   4.000      45.0    10.0%      25.0%       5.0      4.0      7.0",
        "theirs                  4.000   4.000   4.000      22.5    10.0%                 20.0",
        "saved bytes are 1.250 of the formula's",
        "against theirs: speed 2.00, saved bytes 0.250, peak ",
    ]
    about |= {"adapters": 2, "rows": 2, "length": 16, "micro_batches": 1, "tokens": 64, "load": [1.0, 2.0]}
    sides = {"in turn": {"seconds": [2.0], "peak": 7e6}, "together": {"seconds": [1.0], "peak": None}}
    assert report_lines({**about, "ratio": 2.0, "of_one_adapter": 0.5, "sides": sides}) == [
        "m, 2 adapters, tl6 r 8 of qkv, o_proj, bf16 on CPU; recompute none; kernels not compiled",
        "threads a process: 2, default malloc, torch 2, deepspeed not installed, load 1.0 to 2.0",
        "2 x 16 tokens an adapter and step; together in 1 micro-batch",
        "                            seconds   least    most  tokens/s  peak MB",
        "in turn                       2.000   2.000   2.000      32.0      7.0",
        "together                      1.000   1.000   1.000      64.0",
        "together against in turn 2.00, against one adapter with all tokens 0.50",
    ]


def test_decoding_by_hand() -> None:
    assert share_of_equal_tokens([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 7, 6]]) == 4 / 6
    about = {"model": "m", "dtype": "fp32", "batch_size": 2, "prompt_tokens": 9, "new_tokens": 4, "equal_tokens": 0.5}
    lines = report_lines({**about, **SETUP, "seconds": {"here": [2.0, 1.0, 4.0], "there": [3.0, 3.0, 3.0]}})
    assert lines[0] == "m in fp32 on CPU: 2 prompts of 9 tokens together, 4 new tokens each, 50.0% of them equal"
    assert lines[3].split() == ["here", "2.000", "1.000", "4.000", "4.0"]
    assert lines[-1] == "ratio of the medians 1.50"


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--ranks=2,x", "--ranks x: input should be a valid integer"),
        ("--layers=0", "--layers 0"),
        ("--shares=1.5", "--shares 1.5"),
        ("--shares=nan", "--shares nan"),
        ("--shares=inf", "--shares inf"),
        ("--shares=0.0001", "--shares 0.0001 with --length 512: no token has a label"),
        ("--lengths=1", "--lengths 1: input should be greater than or equal to 2"),
        ("--lengths=8,4097", "--lengths 4097: llama2-7b was trained for 4096 positions"),
        ("--length=1", "--length 1: input should be greater than or equal to 2"),
        ("--length=4097", "--length 4097: llama2-7b was trained for 4096 positions"),
        ("--repeats=0", "--repeats"),
        ("--supervised=0", "--supervised 0"),
        ("--supervised=1.5", "--supervised 1.5"),
        ("--supervised=nan", "--supervised nan"),
    ],
)
def test_bad_input_is_one_line(flag: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        measure_sides(parse_settings(["--what=scaling", flag], BenchSettings))
