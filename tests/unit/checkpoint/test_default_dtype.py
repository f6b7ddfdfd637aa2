"""The default of --dtype: bf16, but fp32 for the demo on a CPU without bf16 instructions."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint import load_model
from megatron_tiedlora.checkpoint.load_model import check_same_dtype, describe_dtype, resolve_dtype
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.evaluation.plan import plan_evaluations
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.runtime.launch_env import has_bf16_instructions


@pytest.mark.parametrize(
    ("cpu_info", "has_them"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t\t: spectre_v2\n", False),
        ("flags\t\t: fpu avx2 avx512_bf16 clzero\n", True),
        ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd i8mm bf16 dgh\n", True),
        ("Features\t: fp asimd i8mm\n", False),
        (None, True),
    ],
)
def test_instructions_are_those_that_the_system_names(tmp_path: Path, cpu_info: str | None, has_them: bool) -> None:
    file = tmp_path / "cpuinfo"
    if cpu_info is not None:
        file.write_text(cpu_info)
    assert has_bf16_instructions(file) == has_them


@pytest.mark.parametrize(
    ("given", "task", "on_gpu", "fast", "resolved", "described"),
    [
        (None, "demo", False, False, "fp32", "fp32 (this CPU has no bf16 instructions)"),
        (None, "demo", False, True, "bf16", "bf16"),
        (None, "demo", True, False, "bf16", "bf16"),
        (None, "gsm8k", False, False, "bf16", "bf16"),
        ("bf16", "demo", False, False, "bf16", "bf16"),
        ("fp32", "demo", False, False, "fp32", "fp32"),
        ("fp32", "gsm8k", True, True, "fp32", "fp32"),
    ],
)
def test_what_is_given_wins_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    task: str,
    on_gpu: bool,
    fast: bool,
    resolved: str,
    described: str,
) -> None:
    monkeypatch.setattr(load_model, "has_bf16_instructions", lambda: fast)
    assert resolve_dtype(given, get_task(task), on_gpu=on_gpu) == resolved
    assert describe_dtype(given, resolved) == described


@pytest.mark.parametrize("fast", [False, True])
def test_runs_and_evaluations_record_the_dtype_that_they_took(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fast: bool
) -> None:
    monkeypatch.setattr(load_model, "has_bf16_instructions", lambda: fast)
    chosen = {"model": str(write_tiny_model(tmp_path / "model")), "task": "demo"}
    settings = make_settings({**chosen, "max_length": 64, "plan_for": "cpu", "dry_run": True})
    run = plan_run(settings, rank=0, world_size=1)
    evaluation = plan_evaluations(validate_settings(chosen, EvaluateSettings), rank=0, world_size=1)[""]
    expected = "bf16" if fast else "fp32"
    assert run.resolved_settings()["dtype"] == evaluation.resolved_settings(tmp_path)["dtype"] == expected
    assert run.dtype == evaluation.dtype == DTYPES[expected]


def test_hosts_with_other_cpus_are_told_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_dtype("fp32")
    monkeypatch.setattr(load_model, "num_differing", lambda value: {"bf16": 2}[value])
    expected = "--dtype: the default of 2 ranks differs from rank 0's, because their CPUs differ; give --dtype fp32"
    with pytest.raises(UserError, match=f"^{expected}$"):
        check_same_dtype("bf16")
