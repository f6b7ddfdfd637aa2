"""What --model and the data flags mean to tiedlora train, and so where a host looks for it.

This module decides whether a value is a path, two paths or a hub id, and looks in a host's hub cache for a model.
probe.py reads the content of a path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from glob import has_magic
from pathlib import Path

from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.checkpoint.sources import is_model_on_hub
from megatron_tiedlora.cluster.doctor.records import HubRepo
from megatron_tiedlora.data.demo import prepared_model
from megatron_tiedlora.data.readers import is_rows_file, may_be_hub_id, split_hub_name
from megatron_tiedlora.data.sources import parse_sources, without_weight

_READ_OF_A_MODEL = (".json", ".jinja", ".safetensors", "tokenizer.model")  # the rest of a repository is not downloaded
_WEIGHTS = ".safetensors"


def job_files(given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, HubRepo]]:
    """(absolute paths, the hub repository that a path means if no host has it), both by flag.

    Two aligned texts, `A.de,A.en`, are two paths, under `FLAG:1` and `FLAG:2`, and so are several files.

    Args:
        given: the values by flag, as the user gave them.

    Raises:
        UserError: a value is not a valid path, or not a valid list of files.
    """
    paths: dict[str, str] = {}
    hub: dict[str, HubRepo] = {}
    for flag, value in given.items():
        if flag == "model":
            paths[flag] = absolute_path(prepared_model(value) or value, flag=flag)
            if is_model_on_hub(value):
                hub[flag] = HubRepo(kind="model", id=value)
            continue
        names, is_pair = _aligned_texts(value, flag), True
        if len(names) == 1:
            names, is_pair = [source.name for source in parse_sources(value, f"--{flag}")], False
        for number, name in enumerate(names, start=1):
            key = flag if len(names) == 1 else f"{flag}:{number}"
            if not has_magic(name):  # only a job's own start knows what a pattern stands for
                paths[key] = absolute_path(name, flag=flag)
            if not is_pair and may_be_hub_id(hub_id := split_hub_name(name)[0]):
                hub[key] = HubRepo(kind="dataset", id=hub_id)
    return paths, hub


def absolute_path(path: str | Path, *, flag: str) -> str:
    """The absolute path that the hosts are asked for, from this folder and this user's home.

    Raises:
        UserError: it is not a valid path; the message names the flag.
    """
    return os.path.abspath(user_path(path, flag=f"--{flag}"))


def _aligned_texts(value: str, flag: str) -> list[str]:
    """The two names of `A.de,A.en`; any other value is one name."""
    names = [name.strip() for name in value.split(",")]
    is_pair = len(names) == 2 and all(names) and not any(is_rows_file(without_weight(name)) for name in names)
    return names if is_pair and not os.path.exists(absolute_path(value, flag=flag)) else [value]


def cached_model(hub_id: str) -> str | None:
    """The folder of a model in this host's hub cache (under HF_HOME); None if its weights are not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    folder = os.path.dirname(config) if isinstance(config, str) else None
    return folder if folder and any(name.endswith(_WEIGHTS) for name in os.listdir(folder)) else None


def is_read_of_a_model(name: str) -> bool:
    """Whether a job reads this file of a model's repository."""
    return name.endswith(_READ_OF_A_MODEL)
