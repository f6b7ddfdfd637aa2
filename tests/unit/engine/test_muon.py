"""DeepSpeed's Muon is imported without what compiles it, which costs a second of every start."""

from __future__ import annotations

import os
import sys
from types import FunctionType

import pytest

from megatron_tiedlora.engine.engine import import_muon_uncompiled

MUON = "deepspeed.runtime.zero.muon.original_muon"
SWITCH = "TORCHDYNAMO_DISABLE"


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_muon_is_imported_uncompiled(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """And the switch is as it was, so that what else is compiled afterwards is compiled."""
    monkeypatch.delitem(sys.modules, MUON, raising=False)
    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    import_muon_uncompiled()
    functions = [function for function in vars(sys.modules[MUON]).values() if isinstance(function, FunctionType)]
    assert "zeropower_via_newtonschulz5" in {function.__name__ for function in functions}
    assert not [function for function in functions if hasattr(function, "_torchdynamo_orig_callable")]
    assert os.environ.get(SWITCH) == before
