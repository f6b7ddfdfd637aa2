"""vLLM calls `register` in each of its processes. The plugin replaces one name of vLLM.

This name is bound to the class that vLLM creates to load adapters. With LoRA, vLLM then calls the replacement, which
compares names and signatures of vLLM with recorded ones. If one is different, it creates vLLM's own manager.
"""

import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

TESTED = (0, 26), (0, 32)  # the first and the last version of vLLM that is tested
_RANGE = "vLLM {}.{} to {}.{}".format(*TESTED[0], *TESTED[1])
# {part of the plugin: {module: {name: parameters}}}. "=" follows a parameter that has a default, and "..." stands for
# further ones. An object that is not callable has its type.
_NAMES = Path(__file__).with_name("vllm_names.json")

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows only what its own loggers write


def register() -> None:
    """Prepare this process for native adapters and VeRA, and for adapters by name if TIEDLORA_ADAPTERS is set.

    The function may be called several times. It never raises an error. If vLLM does not have the expected interfaces,
    a warning is logged, and vLLM does what it does without this plugin.
    """
    with _or_without("native adapters and VeRA"):
        module = import_module("vllm.v1.worker.lora_model_runner_mixin")
        stock = module.LRUCacheWorkerLoRAManager
        if not hasattr(stock, "__wrapped__"):  # it is not replaced yet

            @wraps(stock, updated=())
            def create(*arguments: Any, **options: Any) -> Any:
                return _manager_class(stock)(*arguments, **options)

            module.__dict__["LRUCacheWorkerLoRAManager"] = create
    with _or_without("adapters by name"):
        if os.environ.get("TIEDLORA_ADAPTERS"):
            _check("resolver")
            from megatron_tiedlora.integrations.vllm.resolver import AdapterResolver

            registry = import_module("vllm.lora.resolver").LoRAResolverRegistry
            if "tied_lora" not in registry.get_supported_resolvers():
                registry.register_resolver("tied_lora", AdapterResolver(os.environ, sys.argv))


def _manager_class(stock: Any) -> Any:
    """Return this package's class of managers, or `stock`, vLLM's own."""
    with _or_without("native adapters and VeRA"):
        _check("manager")
        from megatron_tiedlora.integrations.vllm.manager import TiedWorkerLoRAManager

        return TiedWorkerLoRAManager
    return stock


@contextmanager
def _or_without(lost: str) -> Iterator[None]:
    """Log a warning, instead of raising the error, that vLLM works without a part of the plugin."""
    try:
        yield
    except Exception as error:
        fix = f"Use {_RANGE}, or serve plain LoRAs that `tiedlora export` writes"
        why = f"{type(error).__name__}: {error}"
        logger.warning("tied_lora is switched off: %s. This server loads no %s. %s", why, lost, fix)


def _check(part: str) -> None:
    """Raise ImportError if vLLM lacks the recorded names of a part. Log a warning if its version is not tested."""
    version = import_module("vllm").__version__
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not TESTED[0] <= (int(numbers[1]), int(numbers[2])) <= TESTED[1]:
        logger.warning("tied_lora: vLLM %s is not tested with this package; %s is", version, _RANGE)
    if different := [*differences(part)]:
        raise ImportError(f"vLLM {version} has other interfaces ({'; '.join(different[:3])})")


def differences(part: str) -> Iterator[str]:
    """Yield what is different from the recorded names of vLLM for a part of the plugin."""
    for module, names in json.loads(_NAMES.read_text())[part].items():
        for name, recorded in names.items():
            try:
                found: Any = reduce(getattr, name.split("."), import_module(module))
            except (ImportError, AttributeError):
                yield f"{module} has no {name}"
                continue
            here, there = _described(found), recorded.split(", ")
            if there[-1] == "...":  # it is only called
                there[-1:] = [one for one in here[len(there) - 1 :] if "=" in one or "*" in one]
            if here != there:
                yield f"{module}: {name} has ({', '.join(here)}), not ({recorded})"


def _described(found: Any) -> list[str]:
    """Return the parameters of a function or a class, without annotations and defaults, or the type of an object."""
    if not callable(found):
        return [type(found).__name__]
    parameters = inspect.signature(found).parameters.values()
    return [re.split("[: =]", str(one))[0] + "=" * (one.default is not one.empty) for one in parameters] or [""]
