"""Which test rows a run decodes before and after training: its task's record says it, or --test_file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.training.run_data import _test_examples

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
