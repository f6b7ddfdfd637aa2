"""Finds the adapter that a request to a vLLM server names, and compares its base with the served model.

Only vLLM's processes import this module. vLLM asks for a name until its adapter is loaded, and then never again."""

import asyncio
import json
import logging
import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from megatron_tiedlora.base.messages import UserError, first_line, naming
from megatron_tiedlora.base.output_folder import last_name
from megatron_tiedlora.checkpoint.base_identity import base_differences, identify_model
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import read_header
from megatron_tiedlora.convert import index, inputs, open_adapter
from megatron_tiedlora.convert.export_peft import UNNAMED
from megatron_tiedlora.integrations.vllm.factors import check_served, read_served
from megatron_tiedlora.integrations.vllm.serve import ADAPTERS, HUB, PLUGIN

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows only what its own loggers write
_FILES = [CONFIG_FILE, WEIGHTS_FILE]
_ALL_FILES = [*_FILES, inputs.EXPORT_RECORD, *(f"{inputs.NATIVE_FOLDER}/{name}" for name in _FILES)]
_BY_PATH = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")  # vLLM's routes that take any path or name


async def only_by_name(request: Any, call_next: Any) -> Any:
    """Answer 404 to requests that would load an adapter from any path, or remove one. It is a middleware of vLLM."""
    if request.scope["path"].startswith(_BY_PATH):
        from starlette.responses import JSONResponse

        return JSONResponse({"error": {"message": "adapters are loaded by their names", "code": 404}}, status_code=404)
    return await call_next(request)


class AdapterResolver(LoRAResolver):
    """Finds adapters by path in a folder, in the index of this folder, and in hub repositories of allowed owners.

    Nothing outside of the folder is read, even if a link leads there. vLLM answers a request with 404 if there is no
    adapter, and with 400 and the line of a UserError (a ValueError) if the adapter is wrong. The server's `environment`
    has folder and owners, as `tiedlora serve` sets them. Its `command` line limits the rank and kind of adapters."""

    def __init__(self, environment: Mapping[str, str], command: Sequence[str]) -> None:
        self.folder = Path(environment[ADAPTERS]).absolute()
        self.owners = [owner.strip() for owner in environment.get(HUB, "").split(",")]
        flags = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        flags.add_argument("--max-lora-rank", "--max_lora_rank", type=int)
        flags.add_argument("--additional-config", "--additional_config", type=json.loads, default={})
        given, _ = flags.parse_known_args(command)
        self._limits = {"max_rank": given.max_lora_rank, "only_tied": given.additional_config.get(PLUGIN) is True}
        self._find_model, self._identify, self._lock = cache(find_model), cache(identify_model), Lock()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request for the adapter `lora_name`, or None if there is none. Raise UserError if the name is
        ambiguous, or if the adapter has a different base, is damaged or does not fit. vLLM replaces the number 1."""
        folder = await asyncio.to_thread(self._find, base_model_name, lora_name)
        return None if folder is None else LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))

    def _find(self, base_model: str, name: str) -> Path | None:
        if not name.isprintable() or any(not part or part.startswith(".") for part in name.split("/")):
            return None  # hidden folders are still being written
        try:
            with naming(f"LoRA adapter {name}"):
                if folder := self._in_folder(name) or self._in_index(name) or self._on_hub(name):
                    self._check(folder, base_model)
                return folder
        except UserError as error:
            logger.warning("%s", error)  # vLLM's answer hides paths
            raise

    def _in_folder(self, name: str) -> Path | None:
        """Return the folder NAME, NAME/adapter or NAME/native. The folder's own name stands for the folder itself."""
        places = [self.folder / name, *([self.folder] if name == self.folder.name else [])]
        return next(filter(None, (self._real(place / inside) for place in places for inside in ("", *UNNAMED))), None)

    def _real(self, path: Path) -> Path | None:
        """Return the folder `path` with all links resolved, or None if it has no adapter or a link leads out."""
        real, root = Path(os.path.realpath(path)), os.path.realpath(self.folder)
        inside = all(Path(os.path.realpath(real / name)).is_relative_to(root) for name in _ALL_FILES)
        try:
            return real if inside and all((real / name).is_file() for name in _FILES) else None
        except OSError:  # no permission, or the name is too long
            return None

    def _in_index(self, name: str) -> Path | None:
        """Return the folder of the adapter with this alias, or whose run has this name. Raise UserError if several runs
        have it, or if the alias names no adapter in the index."""
        if not (self.folder / index.INDEX_FILE).is_file():
            return None
        content = index.read_index(self.folder)
        if name not in content.aliases and not content.named(name):
            return None
        return self._real(self.folder / index.find_entry(self.folder, name, content).path)

    def _on_hub(self, name: str) -> Path | None:
        """Download the adapter of the hub repository `name` if its owner is allowed."""
        owner, _, repository = name.partition("/")
        if not repository or owner not in self.owners:
            return None
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=_ALL_FILES))
        except Exception as error:  # the hub's client raises many types
            logger.warning("%s cannot be downloaded from the hub (%s)", name, first_line(error))
            return None
        return folder if (folder / CONFIG_FILE).is_file() else None

    def _check(self, folder: Path, base_model: str) -> None:
        """Raise UserError if the adapter has a different base, cannot be read, or does not fit the server."""
        with self._lock:  # concurrent requests read the base once
            source = self._find_model(base_model)
            identity = self._identify(source, "fp32")
        served, trained = read_served(folder, source), open_adapter.exported_base(folder, identity)
        if served is None:
            read_header(folder / WEIGHTS_FILE)  # of a LoRA, whose tensors vLLM reads itself
        elif served.vera is None:
            trained = served.adapter.base_identity
        check_served(folder, served, source, **self._limits)
        if trained is None:
            logger.info("%s: PEFT files do not record whether their base is %s", folder, base_model)
        elif different := base_differences(replace(trained, tokenizer_hash=None), identity):
            of, here, what = last_name(trained.base_model), last_name(base_model), " and ".join(different)
            raise UserError(f"trained on {of}, whose {what} differ from {here}'s; ask a server of its own base")
