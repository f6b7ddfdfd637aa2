"""Families of models. Every module in this package defines one `FAMILY` and is registered automatically."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.hf_config import HfConfig


@dataclass(frozen=True)
class Family:
    """How one family's `config.json` is read.

    Attributes:
        model_type: the value of that field in `config.json`.
        read: from the fields to the shape; it raises UserError for features that are not implemented.
    """

    model_type: str
    read: Callable[[HfConfig], ModelShape]


@cache
def families() -> Mapping[str, Family]:
    """Every family by its `model_type`."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.FAMILY.model_type: module.FAMILY for module in modules}


def shape_from_hf(values: Mapping[str, Any], *, source: str = "config.json") -> ModelShape:
    """The shape that the fields of a Hugging Face config describe.

    Raises:
        UserError: the name of a model type, feature or field that is not implemented.
    """
    kind = values.get("model_type")
    family = families().get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(sorted(families()))
        raise UserError(f"{source}: model_type {shown(kind)} is not implemented. This version trains {known}")
    config = HfConfig(values, source)
    shape = family.read(config)
    config.reject_unread()
    return shape
