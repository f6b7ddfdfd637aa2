"""Builds the command and the environment of a vLLM server that finds the adapters in a folder by name.

Nothing here imports vLLM. The server loads the plugin of this package, and `resolver` finds the adapters."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.messages import UserError, bytes_in_words, count_text, enumerate_names
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.adapter_settings import ServeSettings
from megatron_tiedlora.convert import collection, serving
from megatron_tiedlora.convert.export_peft import UNNAMED, base_location
from megatron_tiedlora.convert.inputs import NATIVE_FOLDER
from megatron_tiedlora.integrations.vllm.factors import ServedAdapter, check_served, read_unloaded
from megatron_tiedlora.runtime.run_folder import RunFolder

PLUGIN = "tied_lora"  # the name of the plugin, and its key in vLLM's --additional-config
ADAPTERS, HUB = "TIEDLORA_ADAPTERS", "TIEDLORA_HUB"  # variables for `resolver`
_TIED = {"tied": [True], "both": [True, False], "expanded": [False]}  # the slots of each kind
_CACHE_BYTES = 16e9  # host memory that --max-cpu-loras may use by default
_MOST_PROBLEMS = 5  # that are told one by one


def find_servable(root: Path, source: ModelSource, *, only_tied: bool) -> tuple[dict[str, ServedAdapter], list[str]]:
    """Return the adapters in `root` that a server of `source` can serve, without tensors, by their names in requests,
    and a sentence for each of the others. Raise UserError if `root` is not a folder."""
    found, problems = dict[str, ServedAdapter](), list[str]()
    for folder in progress_bar("adapters", "adapter", collection.find_folders(root)):
        if folder != root and folder.name != "adapter" and RunFolder(folder.parent).is_run:
            continue  # an export of this run
        named, native = folder.parent if folder.name in UNNAMED and folder != root else folder, folder / NATIVE_FOLDER
        try:
            served = read_unloaded(native if (native / CONFIG_FILE).is_file() else folder, source)
            if served.adapter.base_identity.base_hash != source.base_hash:
                raise UserError(f"{folder}: its base is not {source.name}")
            check_served(folder, served, source, max_rank=serving.VLLM_RANKS[-1], only_tied=only_tied)
            found[root.name if named == root else str(named.relative_to(root))] = served
        except UserError as error:
            problems.append(f"not served: {error}")
    return found, problems


def plan_server(settings: ServeSettings, source: ModelSource) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the words of the command that serves the adapters in --adapters whose base is `source`, the variables of
    its environment, and notes. Raise UserError if none can be served, or if vLLM has no LoRA for the model."""
    if why := serving.why_no_lora(source.shape):
        raise UserError(f"--model {settings.model}: {why}")
    if any(flag.replace("_", "-").startswith("--additional-config") for flag in settings.flags):
        raise UserError("--additional-config has the kind of slots; take the command of --dry_run, and add to it")
    root = Path(os.path.abspath(settings.adapters))
    found, notes = find_servable(root, source, only_tied=settings.slots == "tied")
    if not found and not settings.hub:
        because = "".join(f" ({note})" for note in notes[:1])
        raise UserError(f"--adapters {settings.adapters}: has no adapter to serve{because}; give another folder")
    if more := len(notes[_MOST_PROBLEMS:]):
        notes[_MOST_PROBLEMS:] = [f"not served: {more} more"]

    kind, config, targets, rank = slots_for([*found.values()], source, kind=settings.slots)
    of_slot = [source.shape.block.adaptable[name] for name in targets], rank, source.shape.num_layers
    size = sum(serving.slot_bytes(*of_slot, tied=is_tied) for is_tied in _TIED[kind])
    slots = settings.max_loras or (64 if kind == "tied" else serving.LARGEST_BATCH)
    cached = max(slots, min(len(found), int(_CACHE_BYTES // size)))
    names, adapters, cache = enumerate_names([*found]), count_text(len(found), "adapter"), count_text(cached, "adapter")
    notes.append(f"{adapters} up to rank {rank} on {', '.join(targets)}: {names or 'only from the hub'}")
    notes.append(f"{count_text(slots, 'slot')} ({kind}) of {bytes_in_words(size)}; {cache} in host memory")

    words = serving.vllm_words(base_location(source), targets, rank=rank, slots=slots, cached=cached)
    words += ["--middleware", f"{__package__}.resolver.only_by_name"]
    words += ["--additional-config", json.dumps(config)] if config else []
    added = {ADAPTERS: str(root), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    added |= {HUB: ",".join(settings.hub)} if settings.hub else {}
    return [*words, *settings.flags], added | plugin_variables(), notes


def slots_for(
    found: Sequence[ServedAdapter], source: ModelSource, *, kind: str | None = None
) -> tuple[str, dict[str, Any], list[str], int]:
    """Return, for a server of these adapters, the kind of slots, by default as the adapters need, the values of vLLM's
    --additional-config and --max-lora-rank for them, and, before the rank, the names of the adapted linears."""
    tied = [not served.why_not_tied for served in found]
    kind = kind or ("both" if len({*tied}) != 1 else "tied" if all(tied) else "expanded")
    configs, linears = [served.adapter.config for served in found], source.shape.block.adaptable
    adapted = {target.name for config in configs for target in config.targets} or linears
    rank = serving.allowed_rank(max((config.rank for config in configs), default=16))  # on the hub it is unknown
    config = {} if kind == "expanded" else {PLUGIN: kind == "tied" or kind}
    return kind, config, [name for name in linears if name in adapted], rank


def plugin_variables() -> dict[str, str]:
    """Return the environment variables with which vLLM loads this package's plugin, if VLLM_PLUGINS lacks it."""
    plugins = os.environ.get("VLLM_PLUGINS", PLUGIN)
    return {} if PLUGIN in plugins.split(",") else {"VLLM_PLUGINS": ",".join(filter(None, (plugins, PLUGIN)))}
