"""Copies of a PEFT adapter folder with something changed, and what the package says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.open_adapter import read_peft

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def with_fields(plain: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of `plain` in `folder` with other fields in its config."""
    shutil.copytree(plain, folder)
    content = json.loads((plain / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))
    return folder


def with_tensors(plain: Path, folder: Path, changes: Mapping[str, torch.Tensor | None]) -> Path:
    """A copy of `plain` in `folder` with other tensors; None takes one out."""
    shutil.copytree(plain, folder)
    tensors = {**load_file(plain / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    return folder


def rejection(base: Path, folder: Path) -> str:
    """The one line with which an adapter of `base` is rejected, without the folder at its start."""
    with pytest.raises(UserError) as caught:
        assert read_peft(folder, find_model(str(base))).adapter
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message
    return message.removeprefix(f"{folder}/")
