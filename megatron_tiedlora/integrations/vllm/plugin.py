"""vLLM calls `register` in each of its processes. The plugin replaces one name of vLLM.

This name is bound to the class that vLLM creates to load adapters. It is replaced when vLLM imports the module, which
not every process does. With LoRA, vLLM then calls the replacement, which compares names and signatures of vLLM with
recorded ones. If one is different, the replacement creates vLLM's own manager.
"""

import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from functools import reduce, wraps
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TESTED = (0, 26), (0, 32)  # the first and the last version of vLLM that is tested
_RANGE = "vLLM {}.{} to {}.{}".format(*TESTED[0], *TESTED[1])
# {part of the plugin: {module: {name: parameters}}}. "=" follows a parameter that has a default, and "..." stands for
# further ones. "uses" precedes names in a function's code. An object that is not callable has its type.
_NAMES = Path(__file__).with_name("vllm_names.json")
_KERNELS = {"vllm.lora.ops.triton_ops", "vllm.lora.punica_wrapper.punica_gpu"}
_MODULE, _MANAGER, _RESOLVER = "vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager", "tied_lora"

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows only what its own loggers write


def register() -> None:
    """Prepare this process for native adapters and VeRA, and for adapters by name if TIEDLORA_ADAPTERS is set.

    The function may be called several times. It never raises an error. If vLLM does not have the expected interfaces,
    a warning is logged, and vLLM does what it does without this plugin.
    """
    try:
        if _MODULE in sys.modules:
            _replace_manager(sys.modules[_MODULE])
        elif _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
        if os.environ.get("TIEDLORA_ADAPTERS") and _fits("resolver"):
            from megatron_tiedlora.integrations.vllm.resolver import named_resolvers

            registry = import_module("vllm.lora.resolver").LoRAResolverRegistry
            if _RESOLVER not in registry.get_supported_resolvers():
                for name, resolver in named_resolvers(os.environ).items():
                    registry.register_resolver(name, resolver)
    except Exception as error:
        _warn("resolver", f"{type(error).__name__}: {error}")


def differences(part: str) -> Iterator[str]:
    """Yield what is different from the recorded names of vLLM for a part of the plugin. Names in modules with Triton
    kernels are compared only where vLLM uses Triton."""
    for module, names in json.loads(_NAMES.read_text())[part].items():
        if module in _KERNELS and not import_module("vllm.triton_utils").HAS_TRITON:
            continue
        for name, recorded in names.items():
            try:
                found: Any = reduce(getattr, name.split("."), import_module(module))
            except (ImportError, AttributeError):
                yield f"{module} has no {name}"
                continue
            expected, _, used = recorded.partition(" uses ")
            here, there = _described(found), expected.split(", ")
            if there[-1] == "...":  # it is only called
                there[-1:] = [one for one in here[len(there) - 1 :] if "=" in one or "*" in one]
            if here != there:
                yield f"{module}: {name} has ({', '.join(here)}), not ({expected})"
            elif missing := {*used.split()} - {*(inspect.unwrap(found).__code__.co_names if used else ())}:
                yield f"{module}: {name} does not use {', '.join(sorted(missing))}"


def _described(found: Any) -> list[str]:
    """Return the parameters of a function or a class, without annotations and defaults, or the type of an object."""
    if not callable(found):
        return [type(found).__name__]
    parameters = inspect.signature(found).parameters.values()
    return [re.split("[: =]", str(one))[0] + "=" * (one.default is not one.empty) for one in parameters] or [""]


def _fits(part: str) -> bool:
    """Return whether vLLM has the recorded names. If not, or if its version is not tested, log a warning."""
    version = import_module("vllm").__version__
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not TESTED[0] <= (int(numbers[1]), int(numbers[2])) <= TESTED[1]:
        logger.warning("tied_lora: vLLM %s is not tested with this package; %s is", version, _RANGE)
    if different := [*differences(part)]:
        _warn(part, f"vLLM {version} has other interfaces ({'; '.join(different[:3])})")
    return not different


def _warn(part: str, why: str) -> None:
    lost = "finds no adapters by name" if part == "resolver" else "refuses native adapters and VeRA"
    fix = f"Use {_RANGE}, or serve plain LoRAs that `tiedlora export` writes"
    logger.warning("tied_lora is switched off: %s. This server %s. %s", why, lost, fix)


def _find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
    """Return the spec of the module whose name is replaced at the end of its import, or None for other modules."""
    spec = PathFinder.find_spec(name, path) if name == _MODULE else None
    if spec is not None and spec.loader is not None:
        execute = spec.loader.exec_module

        def execute_and_replace(module: Any) -> None:
            execute(module)
            _replace_manager(module)

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
    return spec


_FINDER: Any = SimpleNamespace(find_spec=_find_spec)  # for `sys.meta_path`


def _replace_manager(module: Any) -> None:
    stock = getattr(module, _MANAGER, None)
    if stock is None:
        _warn("manager", f"{_MODULE} has no {_MANAGER}")
    elif not hasattr(stock, "__wrapped__"):  # it is not replaced yet

        @wraps(stock, updated=())
        def create(*arguments: Any, **options: Any) -> Any:
            return _manager_class(stock)(*arguments, **options)

        module.__dict__[_MANAGER] = create


def _manager_class(stock: Any) -> Any:
    """Return this package's class of managers, or `stock`, vLLM's own."""
    try:
        if _fits("manager"):
            from megatron_tiedlora.integrations.vllm.manager import TiedWorkerLoRAManager

            return TiedWorkerLoRAManager
    except Exception as error:
        _warn("manager", f"{type(error).__name__}: {error}")
    return stock
