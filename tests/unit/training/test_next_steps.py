"""The end of a run: what it exports and merges, and its last lines, whose commands a shell takes as they stand."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.native_files import with_adapter, write_exports, write_native
from support.tiny_models import write_tiny_model

from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.convert.merge import is_merge_of
from megatron_tiedlora.convert.verify import Verification
from megatron_tiedlora.model.hf_config import StoredFormat
from megatron_tiedlora.planning.adapter_plans import _test_examples
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests
from megatron_tiedlora.training import finish


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "the base")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A run folder with adapter/, peft/ and a merged/ of this adapter."""
    (tmp_path / "a run").mkdir()
    return write_exports(tmp_path / "a run", base)


def ended(run: Path, base: Path) -> list[str]:
    """The lines at the end of a run whose task merges nothing itself."""
    settings = make_settings({"task": "gsm8k", "model": str(base), "rank": 4})
    plan = SimpleNamespace(source=find_model(str(base)), settings=settings)
    trainer: Any = SimpleNamespace(folder=RunFolder(run), plan=plan)
    return finish.next_steps(trainer)


def commands(lines: list[str]) -> list[list[str]]:
    """The words of each command after `next`, as a shell reads them."""
    found = [line.strip() for line in lines[lines.index("next") + 1 :]]
    return [shlex.split(line) for line in found if not line.startswith(("#", "from "))]


def test_a_merge_of_this_adapter_is_listed(run: Path, base: Path) -> None:
    lines = ended(run, base)
    assert "  merged/   the base with the adapter merged in, for transformers" in lines
    assert any(line.startswith("  adapter/  the adapter, ") for line in lines)  # of any method
    assert not any("merge_adapter" in line for line in lines)
    (python,) = [line.strip() for line in lines if line.startswith("  from ")]
    found: dict[str, Any] = {}
    exec(f"{python.replace('; ', '; model = ')}", found)
    assert found["model"].config.num_hidden_layers == 3


@pytest.mark.parametrize("state", ["outdated", "no record", "broken record", "none"])
def test_another_merge_is_not_listed_and_the_command_merges_anew(run: Path, base: Path, state: str) -> None:
    """A resumed run that became longer may have another best adapter than the merged/ of before."""
    merged = run / "merged"
    if state == "outdated":
        shutil.rmtree(run / "adapter")
        write_native(run / "adapter", base, with_adapter(base, "tl6", seed=9)[2])
        shutil.rmtree(run / "peft")
        adapter = load_native_adapter(run / "adapter")
        finish.export_peft(find_model(str(base)), adapter, run / "peft", native=run / "adapter")
    elif state == "no record":
        (merged / "tiedlora_merge.json").unlink()
    elif state == "broken record":
        (merged / "tiedlora_merge.json").write_text("{")
    else:
        shutil.rmtree(merged)
    lines = ended(run, base)
    named = [line for line in lines if line.startswith("  merged/")]
    new = merged if state == "none" else run / "merged-2"
    expected = [] if state == "none" else ["  merged/   has a different adapter; the first command merges this one"]
    assert named == expected and not any("from_pretrained" in line for line in lines)
    merging, verifying, *_ = commands(lines)
    assert merging[:2] == ["tiedlora", "merge"] and verifying[:2] == ["tiedlora", "verify"]
    assert call("merge", merging[2:]) == 0 and is_merge_of(new, load_native_adapter(run / "adapter"))
    assert call("verify", [*verifying[2:], "--in=none"]) == 0


def test_every_line_is_one_for_a_shell(run: Path, base: Path) -> None:
    lines = ended(run, base)
    script = "\n".join(line for line in lines[lines.index("next") + 1 :] if not line.startswith("  from "))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    programs = [words[0] for words in commands(lines)]
    assert programs == ["tiedlora", "vllm", "python", "python", "llama-server"]
    by_name, vllm, *_ = commands(lines)
    assert by_name == ["tiedlora", "serve", "--model", str(base), "--adapters", str(run)]
    assert call("serve", [*by_name[2:], "--dry_run"]) == 0
    assert vllm[:3] == ["vllm", "serve", str(base)] and f"tied={run / 'peft'}" in vllm


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (0.81249, "validation loss 0.8125"),
        (RunStopped(15, "SIGTERM"), "validation loss not computed, because a signal arrived"),
        (torch.OutOfMemoryError("no memory"), "validation loss not computed, because memory is too small"),
    ],
)
def test_the_loss_on_the_stored_base_cannot_undo_a_run(
    found: Any, said: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(*_: Any) -> float:
        if isinstance(found, float):
            return found
        raise found

    monkeypatch.setattr(finish, "_original_loss", loss)
    plan = SimpleNamespace(source=find_model(str(base)), settings=SimpleNamespace(base="nf4"), dtype_name="bf16")
    run: Any = SimpleNamespace(plan=plan)
    assert finish.original_loss(run, StopRequests()) == [f"on the base as it is stored, in bf16: {said}"]
    plan.settings.base = None
    assert finish.original_loss(run, StopRequests()) == []


# What a run takes from its task's record ------------------------------------------------------------------------------

ROWS = 30


@pytest.mark.parametrize(
    ("task", "with_file", "count"),
    [("demo", False, 24), ("demo", True, 24), ("gsm8k", False, 0), ("gsm8k", True, ROWS)],
)
def test_rows_that_are_scored(task: str, with_file: bool, count: int, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "2\\n#### 2"}\n' * ROWS)
    files: dict[str, Any] = {"test_file": str(file)} if with_file else {}
    assert len(_test_examples(make_settings({"task": task, **files}), tokenizer=None)) == count


@pytest.mark.parametrize(
    ("task", "stored", "merges"),
    [("demo", None, True), ("demo", StoredFormat("bitsandbytes", "nf4"), False), ("gsm8k", None, False)],
)
def test_a_run_merges_where_its_task_says_so(
    task: str, stored: StoredFormat | None, merges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("plot_losses", "load_native_adapter", "export_peft", "merge_adapter"):
        monkeypatch.setattr(finish, name, lambda *_, name=name, **__: called.append(name))
    monkeypatch.setattr(finish, "verify_export", lambda *_, **__: Verification((), ()))
    trainer: Any = SimpleNamespace(
        folder=RunFolder(tmp_path),
        plan=SimpleNamespace(source=SimpleNamespace(stored=stored), settings=make_settings({"task": task})),
    )
    lines = finish.export(trainer, StopRequests())
    assert called == ["plot_losses", "load_native_adapter", "export_peft", *(["merge_adapter"] if merges else [])]
    assert bool(lines) == merges
