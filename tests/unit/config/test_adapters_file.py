"""The file of --adapters: what each adapter's settings become, and what is rejected by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.adapters_file import PER_ADAPTER, read_adapters
from megatron_tiedlora.config.settings import Settings, make_settings

GIVEN = {"model": "some/model", "train_file": "all.jsonl", "learning_rate": 3e-4, "max_steps": 50}


def written(folder: Path, text: str) -> str:
    file = folder / "adapters.yaml"
    file.write_text(text)
    return str(file)


def test_an_entry_is_the_command_line_with_its_own_settings(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        """
- name: small
  rank: 2
  layers: 1,4
- name: Large.2
  rank: 64
  targets: all
  train_file: other.jsonl
  epochs: 2
  learning_rate: 1.0e-4
""",
    )
    found = read_adapters(file, make_settings(GIVEN))
    assert list(found) == ["small", "Large.2"]
    assert found["small"] == make_settings({**GIVEN, "rank": 2, "layers": (1, 4)})
    own = {"rank": 64, "targets": "all", "train_file": "other.jsonl", "epochs": 2, "learning_rate": 1e-4}
    without = {name: value for name, value in GIVEN.items() if name != "max_steps"}
    assert found["Large.2"] == make_settings({**without, **own}), "its epochs take the place of --max_steps"
    assert found["Large.2"].model_fields_set == {*without, *own}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: a\n  dtype: fp32\n", "entry 1 (a): dtype cannot differ between the adapters of a run; give it on"),
        ("- name: a\n  micro_batch_size: 2\n", "entry 1 (a): micro_batch_size cannot differ"),
        ("- name: a\n- name: b\n  rnk: 2\n", "entry 2 (b): unknown setting 'rnk'"),
        ("- name: a\n- name: A\n", "entry 2: the name 'A' is taken by another"),
        ("- rank: 2\n", "entry 1: has no name; give a name of letters"),
        ("- name: ../a\n", "entry 1: cannot be called '../a'"),
        ("- name: 3\n", "entry 1: cannot be called 3"),
        ("- a\n", "entry 1: expected 'name: value' lines, found a str"),
        ("name: a\n", "expected a list, whose entries begin with '- ', found a dict"),
        ("", "holds no adapter"),
        ("- name: a\n  rank: 0\n", "a: --rank 0: "),
        ("- name: a\n  epochs: 1\n  max_steps: 5\n", "a: --epochs 1 and --max_steps 5 both say how long to train"),
        ("- name: a\n- name: b\n  task: demo\n", "max_length would be 4096 for a and 512 for b"),
    ],
)
def test_what_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_adapters(file, make_settings(GIVEN))
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--adapters .*none.yaml: no such file"):
        read_adapters(str(tmp_path / "none.yaml"), make_settings(GIVEN))


def test_every_own_setting_is_one_of_a_run() -> None:
    assert set(Settings.model_fields) > PER_ADAPTER
