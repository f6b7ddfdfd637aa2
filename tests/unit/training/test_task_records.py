"""What a run takes from its task's record: the test rows that it decodes, and whether it merges at the end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.convert.verify import Verification
from megatron_tiedlora.model.hf_config import StoredFormat
from megatron_tiedlora.planning.adapter_plans import _test_examples
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training import finish

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
