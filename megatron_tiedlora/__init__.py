"""Fine-tune dense language models with Tied-LoRA on DeepSpeed. The results are the same in every parallel layout.

docs/api.md describes the Python interface. Each name of the interface is imported at its first use, because importing
torch and transformers takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_tiedlora.base.installation import __version__ as __version__

if TYPE_CHECKING:
    from megatron_tiedlora.base.messages import UserError
    from megatron_tiedlora.config.settings import Settings
    from megatron_tiedlora.integrations.api import TrainedRun, attach, detach, generate, load_adapter, load_base, merge
    from megatron_tiedlora.integrations.api import train as train

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
_MODULES = {"Settings": "config.settings", "UserError": "base.messages"}  # the others: integrations.api


def __getattr__(name: str) -> Any:
    """Import and return the object `name` of the Python interface."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'integrations.api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
