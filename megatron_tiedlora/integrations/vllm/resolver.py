"""Finds the adapter that a request to a vLLM server names, and compares its base with the served model.

Only vLLM's processes import this module. vLLM asks for a name until its adapter is loaded, and then never again."""

import asyncio
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from megatron_tiedlora.base.files import read_json_or_none
from megatron_tiedlora.base.messages import UserError, first_line, naming
from megatron_tiedlora.base.output_folder import last_name
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity, check_same_base, identify_model
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE, NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.checkpoint.tensor_files import read_header
from megatron_tiedlora.convert import index, inputs
from megatron_tiedlora.convert.export_peft import UNNAMED, base_location
from megatron_tiedlora.convert.open_adapter import exported_base
from megatron_tiedlora.data.readers import may_be_hub_id
from megatron_tiedlora.integrations.vllm.factors import read_served
from megatron_tiedlora.integrations.vllm.serve import ADAPTERS, DIFFERS, HUB, PLUGIN

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows only what its own loggers write
_LONGEST_NAME, _LONGEST_PART = 1000, 200  # characters of a name, and bytes of a part of it
_FILES = [CONFIG_FILE, WEIGHTS_FILE]
_HUB_FILES = [*_FILES, inputs.EXPORT_RECORD, *(f"{inputs.NATIVE_FOLDER}/{name}" for name in _FILES)]


class AdapterResolver(LoRAResolver):
    """Finds adapters by path in `folder`, in the index of this folder, and in hub repositories of `owners`.

    Nothing outside of the folder is read, even if a link leads there. An adapter that has a different base (unless
    `base_differs` is set) or is damaged raises UserError. This is a ValueError, so vLLM answers the request with the
    error's line and status 400. For a name without an adapter, vLLM answers with 404."""

    def __init__(self, folder: Path, owners: Sequence[str] = (), *, base_differs: bool = False) -> None:
        self.folder, self.owners, self.base_differs = folder.absolute(), owners, base_differs
        self._lock = Lock()  # of the two caches
        self._bases: dict[str, tuple[ModelSource, BaseIdentity]] = {}
        self._rows: tuple[object, list[index.Entry]] = None, []

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request for the adapter `lora_name`, or None if there is none. The server's loop goes on.

        Raises:
            UserError: the name is ambiguous, or the adapter has a different base, cannot be read or is damaged.
        """
        found = await asyncio.to_thread(self._find, base_model_name, lora_name)
        if found is None:
            return None
        # vLLM replaces the number by one of its own.
        return LoRARequest(lora_name=lora_name, lora_int_id=1 + zlib.crc32(lora_name.encode()) // 2, lora_path=found)

    def _find(self, base_model: str, name: str) -> str | None:
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            return None
        for part in name.split("/"):  # hidden folders, and '..' with them, are still being written
            if not part or part.startswith(".") or len(part.encode()) > _LONGEST_PART:
                return None
        try:
            with naming(said := f"LoRA adapter {name}"):
                folder = self._in_folder(name) or self._in_index(name) or self._on_hub(name)
            notes = () if folder is None else self._check(folder, base_model, said)
        except UserError as error:
            logger.warning("%s", error)  # vLLM's answer hides paths
            raise
        for note in notes:
            logger.info("%s", note)
        return None if folder is None else str(folder)

    def _in_folder(self, name: str) -> Path | None:
        """Return the folder NAME, NAME/adapter or NAME/native. The folder's own name stands for the folder itself."""
        places = [self.folder / name, *([self.folder] if name == self.folder.name else [])]
        candidates = (self._real(place / inside) for place in places for inside in ("", *UNNAMED))
        return next((folder for folder in candidates if folder is not None), None)

    def _real(self, path: Path) -> Path | None:
        """Return the folder `path` with all links resolved, or None if it has no adapter or a link leads out."""
        real, root = Path(os.path.realpath(path)), os.path.realpath(self.folder)
        files = [real / name for name in _FILES]
        try:
            there = all(file.is_file() for file in files)
        except OSError:  # no permission
            return None
        return real if there and all(Path(os.path.realpath(one)).is_relative_to(root) for one in files) else None

    def _in_index(self, name: str) -> Path | None:
        """Return the folder of the adapter with this name in the index. Raise UserError if it names several."""
        file = self.folder / index.INDEX_FILE
        if not file.is_file():
            return None
        with self._lock:
            state = file.stat()
            version = state.st_ino, state.st_mtime_ns, state.st_size
            if self._rows[0] != version:
                self._rows = version, index.find_entries(self.folder, {})
            rows = self._rows[1]
        if not any(name in (row.path, row.name) for row in rows):
            return None
        return self._real(self.folder / index.find_entry(self.folder, name, rows).path)

    def _on_hub(self, name: str) -> Path | None:
        """Download the adapter of the hub repository `name` if its owner is allowed."""
        if name.partition("/")[0] not in self.owners or name.count("/") != 1 or not may_be_hub_id(name):
            return None
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
        except Exception as error:  # the hub's client raises many types
            logger.warning("%s cannot be downloaded from the hub (%s)", name, first_line(error))
            return None
        return next((path for path in (folder, folder / inputs.NATIVE_FOLDER) if (path / CONFIG_FILE).is_file()), None)

    def _check(self, folder: Path, base_model: str, said: str) -> Sequence[str]:
        """Return notes about the adapter, which messages call `said`. Raise UserError if the adapter was trained on a
        different base, or cannot be read."""
        with naming(said):
            with self._lock:  # concurrent requests read the base once
                if base_model not in self._bases:
                    source = find_model(base_model)
                    self._bases[base_model] = source, _named(identify_model(source, "fp32"))
                source, identity = self._bases[base_model]
            served = read_served(folder, source)
            if served is None or not isinstance(served.stored, NativeAdapter):
                read_header(folder / WEIGHTS_FILE)  # of a LoRA, whose tensors vLLM reads itself
            trained, theirs = exported_base(folder, identity), read_json_or_none(folder / CONFIG_FILE) or {}
        if served is not None and isinstance(served.stored, NativeAdapter):
            adapter = replace(served.stored, base_identity=_named(served.stored.base_identity))
            known = replace(identity, dtype=adapter.base_identity.dtype)
            options = {"uses_tokenizer": False, "differs": self.base_differs, "flag": said}
            return inputs.check_base(source, adapter, identify=lambda *_: known, **options)[1]  # type: ignore[arg-type]
        if trained is not None:
            trained = replace(_named(trained), tokenizer_hash=None)
            return check_same_base(trained, identity, source=said, differs=self.base_differs)
        name = str(theirs.get("base_model_name_or_path"))  # PEFT records nothing else about the base
        same = last_name(name) == last_name(base_location(source))
        unknown = f"{said} names the base {name}; PEFT files do not record whether {source.name} is the same"
        return () if same else (unknown,)


class FailedLoads(LoRAResolver):
    """Raises the reason why the server could not load an adapter that `AdapterResolver` had found, such as its rank.

    vLLM logs this reason, asks the next resolver, and would answer only that the adapter "could not be loaded"."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        logging.getLogger("vllm.entrypoints.openai.models.serving").addFilter(self._keep)

    def _keep(self, record: logging.LogRecord) -> bool:
        if record.msg.startswith("Failed to load LoRA") and isinstance(record.args, tuple) and len(record.args) == 3:
            self._reasons[str(record.args[0])] = str(record.args[2]).rpartition("method failed: ")[2]
        return True

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> None:
        """Raise UserError if `lora_name` was found and could not be loaded."""
        if (reason := self._reasons.pop(lora_name, None)) is not None:
            raise UserError(f"LoRA adapter {lora_name}: {reason}")


def named_resolvers(environment: Mapping[str, str]) -> dict[str, LoRAResolver]:
    """Return the resolvers that the variables of `tiedlora serve` describe, in the order in which vLLM asks them."""
    owners = [owner.strip() for owner in environment.get(HUB, "").split(",") if owner.strip()]
    found = AdapterResolver(Path(environment[ADAPTERS]), owners, base_differs=environment.get(DIFFERS) == "1")
    return {PLUGIN: found, f"{PLUGIN}, failed loads": FailedLoads()}


def _named(base: BaseIdentity) -> BaseIdentity:
    """Return the identity with the last part of the base's name, since vLLM hides paths in its answers."""
    return replace(base, base_model=last_name(base.base_model))
