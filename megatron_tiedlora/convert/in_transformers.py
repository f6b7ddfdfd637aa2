"""Logits of exported folders in the software that users load them with: transformers and PEFT, whole models in fp32."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import first_line


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


def require_peft() -> None:
    """Raise UserError if PEFT is not installed."""
    if not has_peft():
        raise UserError("checking a PEFT adapter needs peft; run `pip install peft`")


def peft_logits(folder: Path, adapter: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (b, s, V) of the base in `folder` with the PEFT adapter in `adapter`. Raises UserError if one does not
    load."""
    from peft import PeftModel

    return transformers_logits(folder, tokens, partial(PeftModel.from_pretrained, model_id=str(adapter)))


def transformers_logits(
    folder: Path, tokens: torch.Tensor, wrap: Callable[[Any], Any] = lambda model: model
) -> torch.Tensor:
    """Logits (b, s, V) of the model in `folder`, put into `wrap`. Raises UserError if it does not load."""
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",  # ignore the config's, which may name code on the hub
            )
            model = wrap(loaded).eval()
        except Exception as error:  # of many types; whatever it is, users of transformers could not load it either
            raise UserError(f"{folder}: does not load in transformers ({first_line(error)})") from error
    with torch.no_grad():
        logits: torch.Tensor = model(tokens).logits
    return logits


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bar for each model (ours counts models), and its warning about PEFT's calls."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
