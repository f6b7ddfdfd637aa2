"""tools/bench_scaling.py: every quantity has its table, and bad input is one line."""

from __future__ import annotations

import sys

import pytest
from folders import ROOT

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.presets import PRESETS

TOOLS = ROOT / "tools"
NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def tools_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the command is started as a script."""
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("bench_contestants", "bench_scaling", "bench_step"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_table_for_each_quantity(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_scaling

    monkeypatch.setitem(PRESETS, "llama2-7b", {**PRESETS["llama2-7b"], **NARROW, "vocab_size": 300})
    values = ["--layers=1,3", "--lengths=8,24", "--ranks=2", "--shares="]
    assert bench_scaling.main(["--length=16", "--compile=false", "--repeats=1", *values]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama2-7b, tl6, bf16; kernels not compiled"
    heads = [index for index, line in enumerate(lines) if "tokens/s" in line]
    assert [lines[index].split()[0] for index in heads] == ["num_layers", "length", "rank"]
    assert [line.split()[:2] for line in lines[heads[0] + 1 : heads[1]]] == [["1", "16"], ["3", "16"]]
    assert [line.split()[:2] for line in lines[heads[1] + 1 : heads[2]]] == [["8", "8"], ["24", "24"]]


def test_table_by_hand() -> None:
    from bench_scaling import table

    lines = table("rank", [(2, 100, [2.0, 1.0, 3.0]), (10, 100, [4.0, 4.0, 4.0])])
    assert lines[1].split() == ["2", "100", "2.000", "1.000", "3.000", "50.0"]
    assert lines[2].split() == ["10", "100", "4.000", "4.000", "4.000", "25.0", "0.2500"]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--ranks=2,x", "--ranks 2,x"),
        ("--layers=0", "--layers 0"),
        ("--shares=1.5", "--shares 1.5"),
        ("--shares=nan", "--shares nan"),
        ("--shares=inf", "--shares inf"),
        ("--shares=0.0001", "--shares 0.0001 with --length 512: no token has a label"),
        ("--lengths=1", "--lengths 1: a row of one token"),
        ("--lengths=8,4097", "--lengths 4097: llama2-7b was trained for 4096 positions"),
        ("--length=1", "--length 1: a row of one token"),
        ("--length=4097", "--length 4097: llama2-7b was trained for 4096 positions"),
        ("--repeats=0", "--repeats"),
        ("--supervised=0", "--supervised 0.0"),
        ("--supervised=1.5", "--supervised 1.5"),
        ("--supervised=nan", "--supervised nan"),
    ],
)
def test_bad_input_is_one_line(flag: str, said: str) -> None:
    from bench_scaling import main

    with pytest.raises(UserError, match=said):
        main([flag])
