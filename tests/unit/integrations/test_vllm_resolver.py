"""Adapters by name, for a vLLM server: folder, index and hub; other bases, damage, links; without vLLM itself."""

from __future__ import annotations

import asyncio
import importlib
import shlex
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.flipped_bits import flip_bit
from support.hub_stand_in import Hub, hub_stand_in
from support.native_files import with_adapter, write_exports, write_native
from support.peft_folders import changed
from support.run_files import edit_json
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.commands.front import call
from megatron_tiedlora.convert.collection import build_index

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "tiedlora_export.json"
NAME = "megatron_tiedlora.integrations.vllm.resolver"


@dataclass
class Request:
    """The fields of vLLM's LoRARequest that are used."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the resolver, imported beside a stand-in for vLLM."""
    parts: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": Request},
        "vllm.lora.resolver": {"LoRAResolver": type("LoRAResolver", (), {})},
    }  # fmt: skip
    for name, content in parts.items():
        stub = ModuleType(name)
        vars(stub).update(content)
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    write_tiny_model(root / "mine")
    write_tiny_model(root / "other", seed=1)
    return root


@pytest.fixture(scope="module")
def made(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a subfolder, a native folder of another base, and a plain LoRA."""
    root = tmp_path_factory.mktemp("made") / "adapters"
    (root / "team/run").mkdir(parents=True)
    write_exports(root / "team/run", bases / "mine")
    write_native(root / "plain", bases / "mine", with_adapter(bases / "mine", "lora")[2])
    write_native(root / "foreign", bases / "other", with_adapter(bases / "other", "tl6")[2])
    shutil.copytree(root / "team/run/peft", root / "lora")
    shutil.rmtree(root / "lora/native")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "adapters"))


def resolver_of(module: Any, root: Path, owners: str = "", command: str = "") -> Any:
    """The resolver of a server with these variables and this command line."""
    return module.AdapterResolver({"TIEDLORA_ADAPTERS": str(root), "TIEDLORA_HUB": owners}, shlex.split(command))


def found(resolver: Any, name: str, base: Path) -> Path | None:
    """The folder that the resolver finds, as vLLM asks for it."""
    request = asyncio.run(resolver.resolve_lora(str(base), name))
    assert request is None or (request.lora_name == name and request.lora_int_id > 0)
    return None if request is None else Path(request.lora_path)


# Names ---------------------------------------------------------------------------------------------------------------


def test_names_in_a_folder(module: Any, root: Path, bases: Path) -> None:
    resolver, base = resolver_of(module, root), bases / "mine"
    shutil.copytree(root / "team/run/peft/native", root / "kept/native")
    names = {"plain": "plain", "team/run": "team/run/adapter", "team/run/adapter": "team/run/adapter",
             "team/run/peft": "team/run/peft", "kept": "kept/native", "lora": "lora"}  # fmt: skip
    for name, folder in names.items():
        assert found(resolver, name, base) == root / folder, name
    assert found(resolver_of(module, root / "team/run"), "run", base) == root / "team/run/adapter"
    assert found(resolver_of(module, root / "plain"), "plain", base) == root / "plain"


def test_names_that_lead_nowhere(module: Any, root: Path, bases: Path) -> None:
    resolver = resolver_of(module, root / "team")
    shutil.copytree(root / "plain", root / "team/.new")
    names = ["none", "../plain", "run/../../plain", str(root / "plain"), "", ".", "/", "run//adapter", "run/", ".new",
             "a\0b", "\ud800", "x" * 300, "é" * 150, "a/" * 600 + "a", "a/" * 3000 + "a",
             "~", "*", "run/peft/none", "me/run"]  # fmt: skip
    assert {name: found(resolver, name, bases / "mine") for name in names} == dict.fromkeys(names)


def test_links_stay_in_the_folder(module: Any, root: Path, bases: Path) -> None:
    """A link to another version is followed, so that a new version has a path of its own."""
    team, base = root / "team", bases / "mine"
    resolver = resolver_of(module, team)
    (team / "current").symlink_to("run/adapter")
    (team / "outside").symlink_to(root / "plain")
    (team / "file").mkdir()
    shutil.copy(root / "plain" / CONFIG, team / "file")
    (team / "file" / WEIGHTS).symlink_to(root / "plain" / WEIGHTS)
    (team / "circle").symlink_to("circle")
    assert found(resolver, "current", base) == team / "run/adapter"
    shutil.copytree(root / "lora", team / "native")
    (team / "native/native").symlink_to(root / "plain")
    names = ("outside", "file", "circle", "team", "native")
    assert [found(resolver, name, base) for name in names] == [None] * len(names)
    (root / "all").symlink_to(team)
    assert found(resolver_of(module, root / "all"), "run", base) == team / "run/adapter", "the folder itself is a link"


def test_names_in_the_index(module: Any, root: Path, bases: Path) -> None:
    resolver, base = resolver_of(module, root), bases / "mine"
    assert found(resolver, "run", base) is None
    build_index(root)
    assert found(resolver, "run", base) == root / "team/run/adapter", "its run's name"
    shutil.copytree(root / "team/run", root / "other/run")
    assert found(resolver, "run", base) == root / "team/run/adapter", "as it was indexed"
    build_index(root)
    said = refusal(found, resolver, "run", base)
    assert said == f"LoRA adapter run: {root}/adapters.sqlite: run names 2 adapters; give the path of one"
    assert found(resolver, "other/run/adapter", base) == root / "other/run/adapter"
    shutil.rmtree(root / "other/run")
    (root / "other/run").symlink_to(bases)
    (root / "adapters.sqlite").write_bytes(b"no database")
    assert "adapters.sqlite: " in refusal(found, resolver, "none", base)
    build_index(root)
    with sqlite3.connect(root / "adapters.sqlite") as database:  # of an earlier version
        database.execute("PRAGMA user_version = 2")
    said = f"{root}/adapters.sqlite: has format 2, not 3; write it with `tiedlora index {root}`"
    assert refusal(found, resolver, "none", base) == f"LoRA adapter none: {said}"
    assert found(resolver, "plain", base) == root / "plain", "names of folders need no index"


def test_an_alias_in_the_index(module: Any, root: Path, bases: Path) -> None:
    """A request that loads it gets what it names now."""
    resolver, base = resolver_of(module, root), bases / "mine"
    build_index(root)
    for target, folder in {"run": "team/run/adapter", "plain": "plain"}.items():
        assert call("index", [str(root), "alias", "prod", target]) == 0
        assert found(resolver, "prod", base) == root / folder
    shutil.rmtree(root / "plain")
    build_index(root)
    assert "prod names plain, which is not in the index; " in refusal(found, resolver, "prod", base)
    assert call("index", [str(root), "alias", "prod", "--remove"]) == 0
    assert found(resolver, "prod", base) is None


def test_an_indexed_adapter_that_a_link_replaced_is_not_found(module: Any, root: Path, bases: Path) -> None:
    build_index(root)
    shutil.move(root / "team/run", root.parent / "moved")
    (root / "team/run").symlink_to(root.parent / "moved")
    assert found(resolver_of(module, root), "run", bases / "mine") is None


# What is found and wrong -----------------------------------------------------------------------------------------


def test_another_base_is_an_error_of_this_request(
    module: Any, root: Path, bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A ValueError, which vLLM answers with its line. Other requests go on, and so does this one if it is insisted."""
    resolver, base = resolver_of(module, root), bases / "mine"
    said = refusal(found, resolver, "foreign", base)
    assert said == (
        "LoRA adapter foreign: trained on other, whose weights differ from mine's; ask a server of its own base"
    )
    assert said in caplog.text
    assert found(resolver, "plain", base) == root / "plain"
    wide = write_tiny_model(root.parent / "wide", hidden_size=96)
    assert "with hidden_size" in refusal(found, resolver, "foreign", wide)


def test_the_base_of_a_plain_lora(module: Any, root: Path, bases: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Our exports record it; of others it is unknown, which is said."""
    resolver, said = resolver_of(module, root), "PEFT files do not record whether their base is "
    caplog.set_level("INFO")
    assert "whose weights differ" in refusal(found, resolver, "lora", bases / "other")
    assert found(resolver, "lora", bases / "mine") == root / "lora" and said not in caplog.text
    (root / "lora" / RECORD).unlink()
    assert found(resolver, "lora", bases / "other") == root / "lora"
    assert f"{root}/lora: {said}{bases}/other" in caplog.text
    edit_json(root / "lora" / CONFIG, without=["peft_type"])  # vLLM does not ask for it
    assert found(resolver, "lora", bases / "mine") == root / "lora"


def test_damage_is_an_error_with_the_file(module: Any, root: Path, bases: Path) -> None:
    resolver, base = resolver_of(module, root), bases / "mine"
    flip_bit(root / "plain" / WEIGHTS, "A")
    assert f"LoRA adapter plain: {root}/plain/{WEIGHTS}: " in refusal(found, resolver, "plain", base)
    (root / "team/run/adapter" / CONFIG).write_text("{")
    assert f"team/run/adapter/{CONFIG}: " in refusal(found, resolver, "team/run", base)
    with (root / "lora" / WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    assert f"lora/{WEIGHTS}: " in refusal(found, resolver, "lora", base)
    other = changed(root / "team/run/peft", root / "ia3", CONFIG, {"peft_type": "IA3"})
    shutil.rmtree(other / "native")
    assert "IA3" in refusal(found, resolver, "ia3", base)
    assert found(resolver, "team/run/peft", base) == root / "team/run/peft", "others are unharmed"
    edit_json(root / "team/run/peft" / CONFIG, base_model_name_or_path="gone")
    assert "served: no such folder" in refusal(found, resolver, "foreign", root / "served")


def test_what_does_not_fit_the_server_is_an_error(module: Any, root: Path, bases: Path) -> None:
    """As the server's own command says. A worker that knows more refuses it too."""
    both, base = 'serve M --enable-lora --additional-config \'{"tied_lora": "both"}\'', bases / "mine"
    tied = both.replace('"both"', "true")
    for command, names in {
        f"{tied} --max-lora-rank 8": {"plain": "method lora", "lora": "method lora", "team/run": ""},
        f"{tied} --max_lora_rank=8 {both}": {"plain": "", "lora": "", "team/run": ""},
        f"{both} --max-lora-rank=1": dict.fromkeys(("plain", "lora", "team/run"), "greater than --max-lora-rank 1; "),
        f"{both} --max-lora-rank 1 --max-lora-rank 64": {"plain": "", "team/run": ""},
        "--port 1": {"plain": "", "lora": "", "team/run/peft": ""},
    }.items():
        resolver = resolver_of(module, root, command=command)
        for name, why in names.items():
            if not why:
                assert found(resolver, name, base) is not None, (command, name)
                continue
            said = refusal(found, resolver, name, base)
            assert said.startswith(f"LoRA adapter {name}: {root}/{name}") and why in said, (command, said)
            assert "rank" in why or 'start the server with --additional-config \'{"tied_lora": "both"}\'' in said


def test_requests_at_once_read_the_base_once(
    module: Any, root: Path, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile the server's loop answers others."""
    identified, real = list[int](), module.identify_model

    def slow(*words: Any) -> Any:
        identified.append(threading.get_ident())
        time.sleep(0.5)
        return real(*words)

    monkeypatch.setattr(module, "identify_model", slow)
    resolver, ticks = resolver_of(module, root), list[float]()

    async def ask() -> list[Any]:
        names = ("plain", "team/run", "lora", "none", "team/run/peft")
        asked = asyncio.gather(*(resolver.resolve_lora(str(bases / "mine"), name) for name in names))
        while not asked.done():
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)
        return list(await asked)

    paths = [one and one.lora_path for one in asyncio.run(ask())]
    assert paths == [f"{root}/plain", f"{root}/team/run/adapter", f"{root}/lora", None, f"{root}/team/run/peft"]
    assert len(identified) == 1 and identified[0] != threading.get_ident()
    assert len(ticks) >= 10, "the loop was stopped"


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with hub_stand_in() as hub:
        changes = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
                   "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
                   "HF_HUB_CACHE": str(tmp_path / "cache")}  # fmt: skip
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_names_on_the_hub(
    module: Any, root: Path, bases: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only an allowed owner's, only the adapter's files; and then without the network. A folder's name comes first."""
    hub.repositories = {
        "me/tied": {**files_below(root / "team/run/peft"), "model.safetensors": b"large", "README.md": b"text"},
        "me/foreign": files_below(root / "foreign"), "you/tied": files_below(root / "plain"),
        "me/none": {"README.md": b"text"},
    }  # fmt: skip
    tied_slots = """--additional-config '{"tied_lora": true}'"""  # files of the hub's cache are links
    base, resolver = bases / "mine", resolver_of(module, root, "me, they", tied_slots)
    snapshot = found(resolver, "me/tied", base)
    assert snapshot is not None and snapshot.is_relative_to(tmp_path / "cache")
    assert files_below(snapshot).keys() == {CONFIG, WEIGHTS, RECORD, f"native/{CONFIG}", f"native/{WEIGHTS}"}
    assert "whose weights differ" in refusal(found, resolver, "me/foreign", base)
    before = len(hub.reads)
    names = ("you/tied", "me", "me/tied/native", "me/..", "they/../me")
    assert [found(resolver, name, base) for name in names] == [None] * 5 and len(hub.reads) == before
    assert found(resolver, "me/gone", base) is None and found(resolver, "me/none", base) is None
    assert found(resolver_of(module, root), "me/tied", base) is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(resolver, "me/tied", base) == snapshot and found(resolver, "me/unknown", base) is None
    shutil.copytree(root / "plain", root / "me/tied")
    assert found(resolver_of(module, root, "me, they"), "me/tied", base) == root / "me/tied"


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters/x", "/v1/completions"])
def test_adapters_are_not_loaded_from_any_path(module: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = SimpleNamespace(JSONResponse=lambda content, status_code: status_code)
    monkeypatch.setitem(sys.modules, "starlette.responses", answers)

    async def next_one(request: Any) -> int:
        return 200

    status = asyncio.run(module.only_by_name(SimpleNamespace(scope={"path": path}), next_one))
    assert status == (200 if path == "/v1/completions" else 404)
