"""Families of models, one per module. The module has the name of the family's `model_type` in `config.json`.

It has `DEFAULTS`, what an absent field means, and `read`, which makes a `ModelShape` of an `HfConfig`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.hf_config import HfConfig

FAMILIES = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))


def shape_from_hf(values: Mapping[str, Any], *, source: str = "config.json") -> ModelShape:
    """The shape that the fields of a Hugging Face config describe.

    Raises:
        UserError: the name of a model type, feature or field that is not implemented.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{source}: model_type {shown(kind)} is not implemented. This version trains {known}")
    family = import_module(f"{__name__}.{kind}")
    config = HfConfig(values, source, family.DEFAULTS)
    shape: ModelShape = family.read(config)
    config.reject_unread()
    return shape
