"""vLLM's plugin in a process with a stand-in for vLLM: what it replaces, when, and that it stays away where vLLM has
other names or parameters than the recorded ones."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.folders import ROOT

from megatron_tiedlora.integrations.vllm import plugin

Names = dict[str, dict[str, str]]  # {module: {name: parameters}}
RECORDED: dict[str, Names] = json.loads((Path(plugin.__file__).parent / "vllm_names.json").read_text())
ALL = [(part, module, name) for part, of in RECORDED.items() for module, names in of.items() for name in names]
MIXIN, OURS = "vllm.v1.worker.lora_model_runner_mixin", "megatron_tiedlora.integrations.vllm"
VALUES: dict[str, Any] = {"str": "", "tuple": (), "bool": True}
MIXIN_SOURCE = '''
class LRUCacheWorkerLoRAManager:
    """vLLM's own."""

    def __init__(self, *given):
        self.given = given


class LoRAModelRunnerMixin:
    def load_lora_model(self, model, vllm_config, device):
        self.lora_manager = LRUCacheWorkerLoRAManager(vllm_config, device, "embeddings")
        self.lora_manager.create_lora_manager
'''


class Manager:
    """Takes the place of this package's manager."""

    def __init__(self, *given: Any) -> None:
        if given and given[0] == "bad":
            raise ValueError("--additional-config: tied_lora = 3 is unknown")
        self.given = given


class Vllm:
    """A package `vllm` in memory that has the recorded names with the recorded parameters. One module is a file."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.add("vllm", __version__="0.32.0+cpu")
        self.add("vllm.triton_utils", HAS_TRITON=True)
        for part in RECORDED.values():
            for module, names in part.items():
                if module != MIXIN:
                    self.add(module)
                    for name, recorded in names.items():
                        self.define(module, name, recorded)
        self.write_mixin(MIXIN_SOURCE)

    def add(self, name: str, **values: Any) -> None:
        """Put a module and its parents into `sys.modules`."""
        parent = name.rpartition(".")[0]
        if parent and parent not in sys.modules:
            self.add(parent)
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = [str(self.folder.joinpath(*name.split(".")))]
            self.patch.setitem(sys.modules, name, module)
        vars(sys.modules[name]).update(values)

    def define(self, module: str, name: str, recorded: str) -> None:
        """Define an object with these parameters, and the class that it belongs to."""
        owner, _, last = name.rpartition(".")
        names: Any = vars(sys.modules[module])
        parameters, _, used = recorded.partition(" uses ")
        code = parameters.replace("=", "=None").replace("...", "more=None")
        found = VALUES.get(parameters)
        if parameters == "property":
            found = property()
        elif last == "_manager_cls" or (last[0].isupper() and not owner and found is None):  # a class
            found = type(last, (), {"__init__": eval(f"lambda self, {code}: None")})
        elif found is None:
            found = eval(f"lambda {code}: ({' '.join(f'self.{one},' for one in used.split())})")
        if not owner:
            names[last] = found
            return
        on_class = owner != "LoRAResolverRegistry"  # an object
        within = names.setdefault(owner, type(owner, (), {}) if on_class else SimpleNamespace())
        setattr(within, last, staticmethod(found) if last == "from_lora_tensors" else found)

    def write_mixin(self, source: str) -> None:
        """Write the module that the plugin changes. It is imported like any file."""
        file = self.folder.joinpath(*MIXIN.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
        self.add(MIXIN.rpartition(".")[0])

    def remove(self, module: str, name: str) -> None:
        """Take an object out."""
        owner, _, last = name.rpartition(".")
        within = sys.modules[module] if not owner else getattr(sys.modules[module], owner)
        delattr(within, last)

    @staticmethod
    def created(*given: Any) -> Any:
        """What vLLM creates to load adapters."""
        return importlib.import_module(MIXIN).LRUCacheWorkerLoRAManager(*given)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    """The stand-in, and one for this package's manager; no process has registered the plugin."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.delenv("TIEDLORA_ADAPTERS", raising=False)
    monkeypatch.setitem(sys.modules, f"{OURS}.manager", SimpleNamespace(TiedWorkerLoRAManager=Manager))
    yield Vllm(tmp_path, monkeypatch)
    sys.modules.pop(MIXIN, None)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages so far."""
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert all(record.name.startswith("vllm.") for record in caplog.records)  # others are not shown
    return [record.getMessage() for record in caplog.records]


def test_the_manager_is_replaced_when_vllm_imports_it(vllm: Vllm, caplog: pytest.LogCaptureFixture) -> None:
    plugin.register()
    assert MIXIN not in sys.modules
    created = vllm.created("config", "cpu", "embeddings")
    assert type(created) is Manager and created.given == ("config", "cpu", "embeddings")
    runner = importlib.import_module(MIXIN).LoRAModelRunnerMixin
    assert plugin.inspect.signature(runner.load_lora_model)  # the rest of the module is as it was
    assert not warnings(caplog)


def test_it_can_be_registered_again_and_late(vllm: Vllm, caplog: pytest.LogCaptureFixture) -> None:
    module = importlib.import_module(MIXIN)  # before the plugin is there
    stock = module.LRUCacheWorkerLoRAManager
    plugin.register()
    replaced = module.LRUCacheWorkerLoRAManager
    assert replaced is not stock and replaced.__wrapped__ is stock and plugin._FINDER not in sys.meta_path
    plugin.register()
    assert module.LRUCacheWorkerLoRAManager is replaced and type(vllm.created()) is Manager
    del sys.modules[MIXIN]
    for _ in range(2):
        plugin.register()
    assert sys.meta_path.count(plugin._FINDER) == 1
    assert type(vllm.created()) is Manager and not warnings(caplog)


def test_an_error_of_the_manager_is_the_server_s(vllm: Vllm) -> None:
    """Such as a wrong value on the command line: it does not switch the plugin off."""
    plugin.register()
    with pytest.raises(ValueError, match="tied_lora = 3 is unknown"):
        vllm.created("bad")


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1+cu130", "0.32.0rc1"])
def test_a_tested_version_says_nothing(vllm: Vllm, caplog: pytest.LogCaptureFixture, version: str) -> None:
    vllm.add("vllm", __version__=version)
    plugin.register()
    assert type(vllm.created()) is Manager and not warnings(caplog)


@pytest.mark.parametrize("version", ["0.25.2", "0.33.0", "1.0.0", "dev"])
def test_another_version_with_the_same_names_is_used_after_a_warning(
    vllm: Vllm, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    vllm.add("vllm", __version__=version)
    plugin.register()
    assert type(vllm.created()) is Manager
    expected = f"tied_lora: vLLM {version} is not tested with this package; vLLM 0.26 to 0.32 is"
    assert warnings(caplog) == [expected]


def test_every_recorded_name_is_compared(vllm: Vllm) -> None:
    """One at a time is removed, has one more parameter, or does not use a name."""
    assert len(ALL) > 80
    for part in RECORDED:
        importlib.import_module(MIXIN)
        assert not [*plugin.differences(part)]
    for part, module, name in ALL:
        recorded = RECORDED[part][module][name]
        if module == MIXIN:
            continue  # it is a file, see below
        parameters, _, used = recorded.partition(" uses ")
        vllm.remove(module, name)
        said = " has (self, *args, **kwargs)" if name.endswith("__init__") else f"{module} has no {name}"
        assert [said in line for line in plugin.differences(part)] == [True]
        other = "another" if parameters in (*VALUES, "property") else f"another, {parameters}".removesuffix(", ")
        vllm.define(module, name, other)
        (line,) = plugin.differences(part)
        assert line.startswith(f"{module}: {name} has (") and line.endswith(f", not ({parameters})")
        if used:
            first, *rest = used.split()
            vllm.define(module, name, " uses ".join([parameters, " ".join(rest)]))
            assert [*plugin.differences(part)] == [f"{module}: {name} does not use {first}"]
        vllm.define(module, name, recorded)
        assert not [*plugin.differences(part)]


def test_what_is_only_called_may_have_more_parameters_with_defaults(vllm: Vllm) -> None:
    where = "vllm.lora.lora_model", "LoRAModel.__init__"
    for more, differs in {"": 0, ", extra=": 0, ", extra=, **rest": 0, ", extra": 1}.items():
        vllm.define(*where, f"self, lora_model_id, rank, loras{more}")
        assert len([*plugin.differences("manager")]) == differs, more
    vllm.define(*where, "self, rank, lora_model_id, loras")
    assert len([*plugin.differences("manager")]) == 1
    # vLLM calls what is overridden here, so that one more parameter with a default is a difference.
    vllm.define("vllm.lora.model_manager", "LRUCacheLoRAModelManager.activate_adapter", "self, lora_id, pin=")
    assert len([*plugin.differences("manager")]) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("manager.activate", "self, lora_id, stream"),
            "activate_adapter has (self, lora_id, stream), not (self, lora_",
        ),
        (None, "vllm.lora.utils has no _all_lora_classes"),
        ("class OtherManager:\n    pass\n", f"{MIXIN} has no LRUCacheWorkerLoRAManager"),
        (
            MIXIN_SOURCE.replace("LRUCacheWorkerLoRAManager(vllm", "OtherManager(vllm"),
            "does not use LRUCacheWorkerLoRAM",
        ),
    ],
)
def test_other_names_leave_vllm_as_it_is(vllm: Vllm, caplog: pytest.LogCaptureFixture, change: Any, said: str) -> None:
    """The warning says what is different, what the server refuses, and what to do."""
    if change is None:
        vllm.remove("vllm.lora.utils", "_all_lora_classes")
    elif isinstance(change, tuple):
        vllm.define("vllm.lora.model_manager", "LRUCacheLoRAModelManager.activate_adapter", change[1])
    else:
        vllm.write_mixin(change)
    plugin.register()
    module = importlib.import_module(MIXIN)
    if hasattr(module, "LRUCacheWorkerLoRAManager"):
        created = vllm.created(1, 2, 3)
        assert type(created).__doc__ == "vLLM's own." and created.given == (1, 2, 3)
    (line,) = warnings(caplog)
    assert line.startswith("tied_lora is switched off: ") and said in line
    assert "This server refuses native adapters and VeRA. Use vLLM 0.26 to 0.32, or serve plain LoRAs that" in line


def test_kernels_are_compared_where_vllm_has_triton(vllm: Vllm) -> None:
    vllm.define("vllm.lora.punica_wrapper.punica_gpu", "PunicaWrapperGPU.add_shrink", "self, y")
    vllm.patch.delitem(sys.modules, "vllm.lora.ops.triton_ops")
    assert len([*plugin.differences("manager")]) == 2
    vllm.add("vllm.triton_utils", HAS_TRITON=False)
    assert not [*plugin.differences("manager")]


def test_a_fault_of_the_plugin_leaves_vllm_as_it_is(vllm: Vllm, caplog: pytest.LogCaptureFixture) -> None:
    vllm.patch.setitem(sys.modules, f"{OURS}.manager", None)  # it cannot be imported
    plugin.register()
    assert type(vllm.created(7)).__doc__ == "vLLM's own."
    (line,) = warnings(caplog)
    assert "ModuleNotFoundError" in line and "refuses native adapters and VeRA" in line


# --------------------------------------------------------------------------------------------- adapters by name


class Registry:
    """vLLM's registry of resolvers."""

    def __init__(self) -> None:
        self.resolvers: dict[str, Any] = {}

    def register_resolver(self, resolver_name: str, resolver: Any) -> None:
        assert resolver_name not in self.resolvers
        self.resolvers[resolver_name] = resolver

    def get_supported_resolvers(self) -> Any:
        return self.resolvers.keys()


def test_the_resolver_is_registered_once_where_there_is_a_folder(
    vllm: Vllm, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    registry = Registry()
    vllm.add("vllm.lora.resolver", LoRAResolverRegistry=registry)
    vllm.patch.setitem(sys.modules, f"{OURS}.resolver", None)  # an import of it would raise an error
    for value in (None, ""):
        if value is not None:
            vllm.patch.setenv("TIEDLORA_ADAPTERS", value)
        plugin.register()
        assert not registry.resolvers and not warnings(caplog)
    vllm.patch.setenv("TIEDLORA_ADAPTERS", str(tmp_path))
    given = SimpleNamespace(named_resolvers=lambda environment: {"tied_lora": environment["TIEDLORA_ADAPTERS"]})
    vllm.patch.setitem(sys.modules, f"{OURS}.resolver", given)
    for _ in range(2):
        plugin.register()
    assert registry.resolvers == {"tied_lora": str(tmp_path)} and not warnings(caplog)


def test_a_resolver_that_fails_takes_nothing_else_with_it(
    vllm: Vllm, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    vllm.patch.setenv("TIEDLORA_ADAPTERS", str(tmp_path))
    vllm.patch.setitem(sys.modules, f"{OURS}.resolver", None)
    plugin.register()
    vllm.define("vllm.lora.resolver", "LoRAResolver.resolve_lora", "self, lora_name")
    plugin.register()
    first, second = warnings(caplog)
    assert "ModuleNotFoundError" in first and "resolve_lora has (self, lora_name), not (self, base_model_name" in second
    assert all("This server finds no adapters by name. Use vLLM 0.26 to 0.32" in line for line in (first, second))
    assert type(vllm.created()) is Manager


# --------------------------------------------------------------------------------------------- what users install


def test_a_process_that_loads_no_adapters_imports_nothing(tmp_path: Path) -> None:
    """vLLM calls the plugin also for `vllm --help`."""
    code = (
        "import importlib.metadata, sys\n"
        "from megatron_tiedlora.integrations.vllm.plugin import register\n"
        "register()\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} - {*sys.stdlib_module_names}))\n"
        "print(*sorted(name for name in sys.modules if name.startswith('megatron_tiedlora.')))\n"
    )
    command = [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    packages, modules = done.stdout.splitlines()
    assert not {*packages.split()} & {"torch", "vllm", "transformers", "numpy", "pydantic", "safetensors", "yaml"}
    ours = {name for name in modules.split() if not name.startswith("megatron_tiedlora.base")}
    assert ours == {"megatron_tiedlora.integrations", OURS, f"{OURS}.plugin"}


def test_the_entry_point_and_the_recorded_names_are_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ((name, value),) = project["project"]["entry-points"]["vllm.general_plugins"].items()
    module, _, function = value.partition(":")
    assert name == "tied_lora" and getattr(importlib.import_module(module), function) is plugin.register
    assert project["tool"]["setuptools"]["package-data"][OURS] == ["vllm_names.json"]
