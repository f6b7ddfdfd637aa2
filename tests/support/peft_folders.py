"""PEFT adapter folders that the package reads as native ones, and copies of one with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import read_peft
from support.peft_models import logits_of, our_logits, share
from support.task_files import refusal

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def imported(peft: Any, base: Path, folder: Path, *, tolerance: float = 1e-5) -> NativeAdapter:
    """PEFT's adapter as it is read from its folder; its logits and merged weights are PEFT's, and it can be saved."""
    peft.save_pretrained(folder / "peft")
    source = find_model(str(base))
    adapter = read_peft(folder / "peft", source).adapter
    save_adapter(folder / "native", adapter)
    assert load_native_adapter(folder / "native").equals(adapter)
    ours = our_logits(source, adapter)
    assert share(ours, logits_of(peft)) <= 1e-5
    with peft.disable_adapter():
        assert share(ours, logits_of(peft)) > 0.01  # the update is there
    merge_adapter(source, adapter, folder / "merged")
    expected = peft.merge_and_unload().state_dict()
    for name, tensor in load_file(folder / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    return adapter


def changed(plain: Path, folder: Path, file: str, changes: Mapping[str, Any]) -> Path:
    """A copy of `plain` in `folder` with other fields in its config, or other tensors; None takes a tensor out."""
    shutil.copytree(plain, folder)
    if file == CONFIG:
        (folder / file).write_text(json.dumps({**json.loads((plain / file).read_text()), **changes}))
    else:
        tensors = {**load_file(plain / file), **changes}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / file)
    return folder


def rejection(base: Path, folder: Path) -> str:
    """The one line with which an adapter of `base` is rejected, without the folder at its start."""
    message = refusal(lambda: read_peft(folder, find_model(str(base))).adapter)
    assert message.startswith(str(folder))
    return message.removeprefix(f"{folder}/")
