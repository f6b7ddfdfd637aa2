"""Tied-LoRA fine-tuning of dense language models on DeepSpeed, exact at any layout.

The Python interface is described in docs/api.md. Its names are imported when they are first used, because torch and
transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_tiedlora.base.extras import __version__ as __version__

if TYPE_CHECKING:
    from megatron_tiedlora.api.adapters import attach, detach, generate, load_adapter, load_base, merge
    from megatron_tiedlora.api.training import TrainedRun, train
    from megatron_tiedlora.base.messages import UserError
    from megatron_tiedlora.config.settings import Settings

__all__ = [
    "Settings",
    "TrainedRun",
    "UserError",
    "attach",
    "detach",
    "generate",
    "load_adapter",
    "load_base",
    "merge",
    "train",
]
_MODULES = {
    **dict.fromkeys(("attach", "detach", "generate", "load_adapter", "load_base", "merge"), "api.adapters"),
    **dict.fromkeys(("TrainedRun", "train"), "api.training"),
    "Settings": "config.settings",
    "UserError": "base.messages",
}


def __getattr__(name: str) -> Any:
    """A name of the interface, imported now."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
