"""Registering the method: once, in an enumeration that PEFT does not extend, and one clear line where it fails."""

from __future__ import annotations

import enum
import pickle
import subprocess
import sys
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import BaseTuner

from megatron_tiedlora import peft as tied_peft
from megatron_tiedlora.checkpoint.native_adapter import PEFT_TYPE
from megatron_tiedlora.peft import TiedLoraConfig, TiedLoraModel


def test_the_type_is_a_member_like_any_other() -> None:
    kind = peft.PeftType
    assert kind(PEFT_TYPE) is kind[PEFT_TYPE] is getattr(kind, PEFT_TYPE) and f"{kind(PEFT_TYPE).value}" == PEFT_TYPE
    assert PEFT_TYPE in list(kind) and isinstance(kind(PEFT_TYPE), kind) and kind(PEFT_TYPE) != kind.LORA
    assert pickle.loads(pickle.dumps(kind(PEFT_TYPE))) is kind(PEFT_TYPE)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is TiedLoraConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is TiedLoraModel


def test_registering_again_changes_nothing() -> None:
    before = list(peft.PeftType), peft.config.PeftConfigMixin.from_json_file.__func__
    tied_peft.register()
    assert before == (list(peft.PeftType), peft.config.PeftConfigMixin.from_json_file.__func__)


def test_a_peft_that_is_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_remap_adapter_state_dict_for_load")
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(ImportError, match=r"needs PEFT 0.21 or later, and this is 0.20.0; run `pip install -U peft`"):
        tied_peft.register()


def test_without_peft_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"megatron_tiedlora.peft needs PEFT .*; run `pip install 'peft>=0.21'`"):
        tied_peft.register()


class Refusing(enum.EnumMeta):
    def __setattr__(cls, name: str, value: Any) -> None:
        if name == PEFT_TYPE:
            raise AttributeError(name)
        super().__setattr__(name, value)


class Sealed(enum.StrEnum, metaclass=Refusing):
    LORA = "LORA"


def test_a_peft_that_does_not_allow_it_is_one_line() -> None:
    with pytest.raises(ImportError, match=r"PEFT 9.9 does not allow a type of another package \(TIED_LORA\)"):
        tied_peft._add_type(Sealed, PEFT_TYPE, version="9.9")
    assert PEFT_TYPE not in Sealed.__members__


def test_peft_alone_names_the_missing_type(tmp_path: Any) -> None:
    """Without the import PEFT says only this; docs/peft.md explains it."""
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{PEFT_TYPE}", "format_version": 2}}')
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1] == f"KeyError: '{PEFT_TYPE}'"
