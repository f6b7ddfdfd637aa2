"""--adapters of an evaluation: the folder and the name of each, which is the name of a folder in the output."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE
from megatron_tiedlora.evaluation.plan import named_adapters


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text("{}")
    return folder


def test_a_name_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (adapter(tmp_path / "runs" / name / "adapter") for name in ("one", "other"))
    (tmp_path / "runs" / "one" / "logs").mkdir()
    monkeypatch.chdir(tmp_path / "runs" / "one" / "logs")
    assert named_adapters([str(tmp_path / "runs")]) == {"one": one, "other": other}
    assert list(named_adapters(["../adapter"])) == ["one"]
    assert named_adapters([f"x={one}", f"y={one}", str(other)]) == {"x": one, "y": one, "other": other}


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "table.csv", "n" * 300])
def test_a_name_must_be_one_of_a_folder_in_the_output(tmp_path: Path, name: str) -> None:
    own = adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"cannot be a folder's name; give NAME=FOLDER"):
        named_adapters([f"{name}={own}"])


def test_so_must_the_name_of_a_run(tmp_path: Path) -> None:
    own = adapter(tmp_path / "table.csv")
    with pytest.raises(UserError, match=r"'table.csv' cannot be a folder's name"):
        named_adapters([str(own)])
    assert named_adapters([f"mine={own}"]) == {"mine": own}
