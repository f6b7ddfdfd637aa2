"""Writes what is published of a run, and uploads it to the Hugging Face hub.

The folder has no path of this host: the base and the tokenizer are named, and files by the last part of their names.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.output_folder import new_output
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.base.yaml_files import read_yaml_mapping
from megatron_tiedlora.checkpoint.native_adapter import write_adapter_files
from megatron_tiedlora.convert.export_peft import base_name, export_peft
from megatron_tiedlora.convert.inputs import BASE_PATH, EXPORT_RECORD, NATIVE_FOLDER
from megatron_tiedlora.convert.open_adapter import open_adapter
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.sharing.card import CardFacts, model_card, without_folders


def check_hub_id(name: str, *, flag: str, owned: bool = False) -> None:
    """Raise UserError if `name`, the value of `flag`, is no id that the hub accepts, or, if `owned`, not OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{flag} {name}: {first_line(error)}") from None
    if owned and "/" not in name:
        raise UserError(f"{flag} {name}: give OWNER/NAME")


def write_published(
    given: str,
    repo: str,
    output: Path,
    *,
    model: str | None = None,
    named: str | None = None,
    base_differs: bool = False,
    say: Callable[[str], object] = str,
) -> None:
    """Write what `repo` is to hold: the PEFT export, the native adapter, the model card and the plot of the losses.

    Args:
        given: a run folder, or the folder of a native adapter.
        model: value of --model.
        named: name of the base [its hub id, or its folder's name].
        base_differs: export for a base that differs from the one in training.
        say: called with each note.

    Raises:
        UserError: there is no adapter, or it cannot be exported.
    """
    run = RunFolder(user_path(given))
    folder = run.adapter if run.is_run else run.path
    if not run.is_run:
        run = RunFolder(folder.parent)
    opened = open_adapter(folder, model, kind="native")
    source, adapter = opened.source, opened.adapter
    name = named or base_name(source)
    if named is None and not source.from_hub:
        say(f"the card names the base by its folder's name, {name}; give --base_name ORG/NAME for its name on the hub")
    facts = CardFacts(
        repo,
        adapter,
        source,
        name,
        base_on_hub=named is not None or source.from_hub,
        settings=read_yaml_mapping(run.settings) if run.is_run else {},
        scores=read_json_object(run.scores, kind="scores") if run.scores.is_file() else {},
    )
    plot = run.path / "loss.png"
    with new_output(output) as temporary:
        inside = nullcontext(temporary)
        export_peft(source, adapter, output, named=name, base_differs=base_differs, say=say, new=lambda _: inside)
        _hide_paths(temporary, facts)
        (temporary / "README.md").write_text(_card(facts, run), encoding="utf-8")
        if run.is_run and plot.is_file() and not plot.is_symlink():
            shutil.copyfile(plot, temporary / plot.name)


def _card(facts: CardFacts, run: RunFolder) -> str:
    try:
        return model_card(facts)
    except (AttributeError, KeyError, TypeError, ValueError):  # the files of a run may be anybody's
        raise UserError(f"{run.scores}: is not a file of scores that a run writes; move it away") from None


def _hide_paths(folder: Path, facts: CardFacts) -> None:
    """Add the native adapter to an export, and name the base and the tokenizer in both without their paths."""
    adapter, given = facts.adapter, facts.adapter.base.tokenizer
    tokenizer = None if given is None else without_folders(given, facts.settings)
    (folder / NATIVE_FOLDER).mkdir()
    base = replace(adapter.base, base_model=facts.base, tokenizer=tokenizer)
    write_adapter_files(folder / NATIVE_FOLDER, adapter.config, base, adapter.state)
    record = read_json_object(folder / EXPORT_RECORD, kind="the record of an export")
    record.pop(BASE_PATH, None)
    write_json(folder / EXPORT_RECORD, {**record, "base_model": facts.base, "tokenizer": tokenizer})


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to the hub, which makes the repository if there is none; returns its address.

    Raises:
        UserError: the hub rejects it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload an adapter")
    except Exception as error:  # the hub's client raises many kinds; each means that the upload is not complete
        raise UserError(f"--repo {repo}: the hub has not taken it ({first_line(error)})") from None
    return str(address)
