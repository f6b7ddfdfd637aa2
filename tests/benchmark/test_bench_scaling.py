"""bench_step.py --what scaling and --what decoding: their tables, and bad input is one line."""

from __future__ import annotations

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.benchmark.compare import measure, share_of_equal_tokens
from megatron_tiedlora.benchmark.report import report_lines
from megatron_tiedlora.commands import bench
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.presets import PRESETS

NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SETUP = {"device": "CPU", "threads": 2, "allocator": "default malloc", "torch": "2", "versions": {}}


def test_a_table_for_each_quantity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PRESETS, "llama2-7b", {**PRESETS["llama2-7b"], **NARROW, "vocab_size": 300})
    values = ["--layers=1,3", "--lengths=8,24", "--ranks=2", "--shares="]
    assert bench.main(["--what=scaling", "--length=16", "--compile=false", "--repeats=1", *values]) == 0
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
        measure(parse_settings(["--what=scaling", flag], BenchSettings))
