"""Builds the command and the environment of a vLLM server that finds the adapters in a folder by name.

Nothing here imports vLLM. The server loads the plugin of this package, and `resolver` finds the adapters."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tiedlora.base.files import read_json_or_none
from megatron_tiedlora.base.messages import UserError, bytes_in_words, count_text, enumerate_names
from megatron_tiedlora.base.methods import find_method
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, read_config
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.adapter_settings import ServeSettings
from megatron_tiedlora.convert import index, inputs, peft_files, serving
from megatron_tiedlora.convert.collection import find_folders
from megatron_tiedlora.convert.export_peft import UNNAMED, base_location
from megatron_tiedlora.convert.open_adapter import read_peft_config
from megatron_tiedlora.runtime.run_folder import RunFolder

PLUGIN = "tied_lora"  # the name of the plugin, and its key in vLLM's --additional-config
ADAPTERS, HUB, DIFFERS = "TIEDLORA_ADAPTERS", "TIEDLORA_HUB", "TIEDLORA_BASE_DIFFERS"  # variables for `resolver`
_MODES: Mapping[str, Any] = {"tied": True, "both": "both"}  # values of the key in --additional-config
_MOST_SLOTS = 64  # tied slots by default, if they take no more memory than `LARGEST_BATCH` expanded ones
_CACHE_BYTES = 16e9  # host memory that --max-cpu-loras may use by default
_RANK_ON_HUB = 16  # if all adapters are on the hub, where their ranks are unknown


class Servable(NamedTuple):
    """An adapter that the server finds by `name`. `tied` tells whether its layers share A and B. `base_hash`, the hash
    of its base's config, is None if it is not recorded."""

    name: str
    rank: int
    targets: Sequence[str]
    tied: bool
    base_hash: str | None


def find_servable(root: Path, source: ModelSource) -> tuple[list[Servable], list[str]]:
    """Return the adapters in the index of `root`, or without an index all adapters in `root`, and a sentence for each
    adapter that cannot be read. Raise UserError if `root` is not a folder, or if its index cannot be read."""
    if not root.is_dir():
        raise UserError(f"--adapters {root}: no such folder; give a folder with adapters")
    if (root / index.INDEX_FILE).exists():
        rows = index.find_entries(root, {})
        folders = (root / row.path for row in rows)
        known = ((row.method, row.rank, row.targets.split(","), row.base_hash) for row in rows)
        return [_native(_name(root, folder), *facts) for folder, facts in zip(folders, known, strict=True)], []
    found, problems = dict[str, Servable](), []
    for folder in progress_bar("adapters", "adapter", find_folders(root)):
        if folder != root and folder.name != "adapter" and RunFolder(folder.parent).is_run:
            continue  # an export of this run
        name, inside = _name(root, folder), folder / inputs.NATIVE_FOLDER
        native = inside if (inside / CONFIG_FILE).is_file() else folder
        try:
            if inputs.adapter_kind(native, flag=str(native)) == "native":
                config, base, _ = read_config(native)
                targets = [target.name for target in config.targets]
                found[name] = _native(name, config.method, config.rank, targets, base.base_hash)
            else:
                found[name] = _peft(name, folder, source)
        except UserError as error:
            problems.append(str(error))
    return list(found.values()), problems


def _name(root: Path, folder: Path) -> str:
    """Return the name of an adapter in requests: its path in `root` without `adapter` or `native` at the end."""
    path = folder.relative_to(root)
    path = path.parent if path.name in UNNAMED else path
    return str(path) if path.parts else root.absolute().name


def _native(name: str, method: str, rank: int, targets: Sequence[str], base_hash: str) -> Servable:
    shared = all(find_method(method).factor(factor).shared_by == "all" for factor in "AB")
    return Servable(name, rank, targets, shared, base_hash)


def _peft(name: str, folder: Path, source: ModelSource) -> Servable:
    """Describe a PEFT adapter. Raise UserError if it adapts other modules than the linears of `source`."""
    file, content = folder / CONFIG_FILE, read_peft_config(folder)
    linears = peft_files.adapted_linears(peft_files.chosen_modules(file, content, source).values(), source)
    ranks = [content.get("r"), *(content.get("rank_pattern") or {}).values()]
    rank = max(peft_files.read_rank(rank, f"{file}: r") for rank in ranks)
    base_hash = (read_json_or_none(folder / inputs.EXPORT_RECORD) or {}).get("base_hash")
    return Servable(name, rank, list(linears), content.get("peft_type") == "VERA", base_hash)


class Server(NamedTuple):
    """The words and the additional environment of a server, and sentences about it for the user."""

    words: Sequence[str]
    environment: Mapping[str, str]
    notes: Sequence[str]


def plan_server(settings: ServeSettings, source: ModelSource, environment: Mapping[str, str]) -> Server:
    """Return the server of the adapters in --adapters whose base is `source`. A VLLM_PLUGINS in the `environment` of
    this process is extended. Raise UserError if vLLM has no LoRA for this model, or if no adapter can be served."""
    if not serving.vllm_has_lora(source.shape):
        raise UserError(f"--model {settings.model}: {serving.NO_STABLELM}")
    found, notes = _fitting(settings, source)
    tied = [one.tied for one in found]
    kind = settings.slots or ("tied" if all(tied) else "both" if any(tied) else "expanded")
    linears, tp_size = source.shape.block.adaptable, settings.tensor_parallel
    targets = [name for name in linears if not found or any(name in one.targets for one in found)]
    rank = serving.allowed_rank(max((one.rank for one in found), default=_RANK_ON_HUB))
    notes.append(f"{count_text(len(found), 'adapter')} up to rank {rank} on {', '.join(targets)}")
    notes[-1] += f": {enumerate_names([one.name for one in found])}" if found else ""

    adapted, layers = [linears[name] for name in targets], source.shape.num_layers
    tied_size, expanded_size = (
        serving.slot_bytes(adapted, rank, layers, tied=is_tied, tp_size=tp_size) for is_tied in (True, False)
    )
    size = {"tied": tied_size, "both": tied_size + expanded_size, "expanded": expanded_size}[kind]
    room = min(_MOST_SLOTS, serving.LARGEST_BATCH * expanded_size // tied_size)
    slots = settings.max_loras or max(1, min(room if kind == "tied" else serving.LARGEST_BATCH, len(found)))
    cached = max(slots, min(len(found), int(_CACHE_BYTES // (size * tp_size))))
    in_all = f"{bytes_in_words(size)}, so {bytes_in_words(slots * size)} on each GPU"
    each = f"a slot: {bytes_in_words(tied_size)} tied, {bytes_in_words(expanded_size)} expanded"
    in_memory = f"{count_text(cached, 'adapter')} in host memory"
    notes.append(f"{count_text(slots, 'slot')} ({kind}) of {in_all} ({each}); {in_memory}")

    words = serving.vllm_words(base_location(source), targets, rank=rank, slots=slots, cached=cached)
    words += ["--tensor-parallel-size", str(tp_size)] if tp_size > 1 else []
    words += ["--additional-config", json.dumps({PLUGIN: _MODES[kind]})] if kind in _MODES else []
    return Server([*words, *settings.flags], _added(settings, environment.get("VLLM_PLUGINS")), notes)


def _fitting(settings: ServeSettings, source: ModelSource) -> tuple[list[Servable], list[str]]:
    """Return the adapters that the server can serve, and sentences about the others."""
    found, problems = find_servable(settings.adapters, source)
    reasons, notes = [_why_not(one, settings, source) for one in found], [f"not served: {said}" for said in problems]
    for reason in dict.fromkeys(filter(None, reasons)):
        names = [one.name for one, why in zip(found, reasons, strict=True) if why == reason]
        notes.append(f"{count_text(len(names), 'adapter')} {reason}: {enumerate_names(names)}")
    fitting = [one for one, why in zip(found, reasons, strict=True) if not why]
    if not fitting and not settings.hub:
        said = "".join(f" ({note})" for note in notes[:1])
        raise UserError(f"--adapters {settings.adapters}: has no adapter that can be served{said}; give another folder")
    return fitting, notes


def _why_not(one: Servable, settings: ServeSettings, source: ModelSource) -> str:
    """Return why an adapter cannot be served, as the end of a sentence; '' if it can."""
    if one.base_hash not in (None, source.base_hash) and not settings.base_differs:
        return f"of another base than {settings.model}, so requests are errors"
    if not serving.allowed_rank(one.rank):
        return f"of a rank above {serving.VLLM_RANKS[-1]}, which vLLM does not accept"
    return "not tied, so --slots tied cannot serve this" if settings.slots == "tied" and not one.tied else ""


def _added(settings: ServeSettings, plugins: str | None) -> dict[str, str]:
    """Return the variables that the server's environment needs in addition. `plugins` is the value of VLLM_PLUGINS."""
    added = {ADAPTERS: os.path.abspath(settings.adapters), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    added |= {HUB: ",".join(settings.hub)} if settings.hub else {}
    added |= {DIFFERS: "1"} if settings.base_differs else {}
    if plugins is not None and PLUGIN not in plugins.split(","):
        added["VLLM_PLUGINS"] = ",".join(filter(None, (plugins, PLUGIN)))
    return added
