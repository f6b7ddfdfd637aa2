"""Writes the files of a trained adapter for publication, and uploads them to the Hugging Face hub.

The files are the PEFT export and a model card with the base model, method, scores, training command and versions. They
have no paths of this host: each path is shortened to its last part.
"""

import html
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tiedlora.base import files, output_folder
from megatron_tiedlora.base.messages import UserError, first_line, printable, user_path
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, write_adapter_files
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config import adapter_settings, cli, fields
from megatron_tiedlora.config.settings import TASK_NAMES, Settings, make_settings
from megatron_tiedlora.convert.export_peft import base_name, export_peft
from megatron_tiedlora.convert.inputs import BASE_PATH, EXPORT_RECORD, NATIVE_FOLDER
from megatron_tiedlora.convert.open_adapter import open_adapter
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.runtime.run_folder import RunFolder

_TIED = "[Tied-LoRA](https://arxiv.org/abs/2311.09578)"
_OTHERS = {"lora": "[LoRA](https://arxiv.org/abs/2106.09685)", "vera": "[VeRA](https://arxiv.org/abs/2310.11454)"}
_MARKS = fields.declared(Settings)
_LICENCE_FIELDS = ("license", "license_name", "license_link")  # in the metadata of a card
_LARGEST_CARD = 2**20  # bytes
# Settings that a run derives from other settings and from its model, if they are not given.
_DERIVED = fields.marked(Settings, derived=True)


def check_hub_id(name: str, *, flag: str, owned: bool = False) -> None:
    """Raise UserError if `name`, the value of `flag`, is no valid hub id, or lacks OWNER/ although `owned` is set."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{flag} {name}: {first_line(error)}") from None
    if owned and "/" not in name:
        raise UserError(f"{flag} {name}: the owner is missing; give OWNER/NAME")


def write_published(settings: adapter_settings.PushSettings, output: Path, *, say: Callable[[str], object]) -> None:
    """Write the files of a hub repository: PEFT export, adapter in this package's format, model card and loss plot.

    Args:
        say: function that is called with the text of each note.

    Raises:
        UserError: the run has no adapter, or the adapter cannot be exported.
    """
    run, named = RunFolder(user_path(settings.run)), settings.base_name
    folder = run.adapter if run.is_run else run.path
    if not run.is_run:
        run = RunFolder(folder.parent)
    opened = open_adapter(folder, settings.model, kind="native")
    source, adapter = opened.source, opened.adapter
    name = named or base_name(source)
    if named is None and not source.from_hub:
        say(f"the model card names the base model {name}, like its folder; give --base_name ORG/NAME for its hub name")
    plot = run.path / "loss.png"
    facts = CardFacts(
        settings.repo,
        adapter,
        source,
        name,
        base_on_hub=named is not None or source.from_hub,
        settings=files.read_yaml_mapping(run.settings) if run.is_run else {},
        scores=files.read_json_object(run.scores, kind="scores") if run.scores.is_file() else {},
        licence=_licence(settings.licence, source, say=say),
        plot=plot if run.is_run and plot.is_file() and not plot.is_symlink() else None,
    )
    with output_folder.new_output(output) as temporary:
        differs, inside = settings.base_differs, nullcontext(temporary)
        export_peft(source, adapter, output, named=name, base_differs=differs, say=say, new=lambda _: inside)
        _hide_paths(temporary, facts)
        try:
            card = model_card(facts)
        except (AttributeError, KeyError, TypeError, ValueError):  # the files may not be those of a run
            raise UserError(f"{run.scores}: this is not a score file of tiedlora train; move it away") from None
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if facts.plot is not None:
            shutil.copyfile(facts.plot, temporary / facts.plot.name)


def _licence(given: str | None, source: ModelSource, *, say: Callable[[str], object]) -> dict[str, str]:
    """Return the licence of the model card: --license, or else the licence in the card of the base."""
    if given is not None:
        return {"license": given}
    card, found = source.weights_folder() / "README.md", dict[str, Any]()
    with suppress(UserError):
        text = files.read_small_text(card, largest=_LARGEST_CARD) if card.is_file() else ""
        if front := re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL):
            found = files.parse_yaml(front[1], dict, source=str(card))
    texts = {name: printable(found[name]) for name in _LICENCE_FIELDS if isinstance(found.get(name), str)}
    if not texts.get("license_link", "https://").startswith("https://"):  # a file in the base's repository
        del texts["license_link"]
    if re.fullmatch(adapter_settings.LICENCE, texts.get("license", "")):
        return texts
    say(f"the model card names no licence, since {card} names none; give it with --license ID")
    return {}


def _hide_paths(folder: Path, facts: "CardFacts") -> None:
    """Add the native/ folder to an export, and remove the paths of the base model and tokenizer from all files."""
    adapter, given = facts.adapter, facts.adapter.base_identity.tokenizer
    tokenizer = None if given is None else without_folders(given, facts.settings)
    (folder / NATIVE_FOLDER).mkdir()
    base = replace(adapter.base_identity, base_model=facts.base, tokenizer=tokenizer)
    write_adapter_files(folder / NATIVE_FOLDER, replace(adapter, base_identity=base))
    record = files.read_json_object(folder / EXPORT_RECORD, kind="the record of an export")
    record.pop(BASE_PATH, None)
    files.write_json(folder / EXPORT_RECORD, {**record, "base_model": facts.base, "tokenizer": tokenizer})


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder to the hub, and return the repository's URL. A missing repository is created.

    Raises:
        UserError: the hub rejects the upload, or cannot be reached.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=repo, commit_message="Upload an adapter")
    except Exception as error:  # the client raises many types; each means that the upload is not complete
        raise UserError(f"--repo {repo}: the upload failed ({first_line(error)}); correct this and try again") from None
    return str(address)


@dataclass(frozen=True)
class CardFacts:
    """The values that the model card of an adapter shows.

    Attributes:
        repo: the repository, as OWNER/NAME.
        source: the base model.
        base: hub id or name of the base model.
        base_on_hub: whether `base` is a hub id.
        settings: content of run.yaml; empty if the file is missing.
        scores: content of scores.json; empty if the file is missing.
        licence: the metadata of the licence by name; empty if it is unknown.
        plot: the plot of the losses, or None.
    """

    repo: str
    adapter: NativeAdapter
    source: ModelSource
    base: str
    base_on_hub: bool
    settings: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]
    licence: Mapping[str, str]
    plot: Path | None


def model_card(facts: CardFacts) -> str:
    """Return the text of the model card (README.md). It begins with the metadata that the hub reads."""
    config = facts.adapter.config
    targets = ", ".join(target.name for target in config.targets)
    trained = sum(config.num_trained().values())
    return "\n".join(
        [
            "---",
            _metadata(facts),
            "---",
            "",
            f"# {output_folder.last_name(facts.repo)}",
            "",
            f"A {_OTHERS.get(config.method, _TIED)} adapter of {_code(facts.base)}: method"
            f" `{config.method}` of rank {config.rank} on {targets} of {len(config.layers)} layers, with {trained:,}"
            " trained parameters.",
            "",
            "`adapter_model.safetensors` is the adapter as a plain LoRA, for PEFT, vLLM and others."
            " `native/` has the tensors as they were trained, for megatron_tiedlora.",
            "",
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            f"from transformers import {facts.source.auto_class}",
            "",
            f"model = {facts.source.auto_class}.from_pretrained({facts.base!r})",
            f"model = PeftModel.from_pretrained(model, {facts.repo!r})",
            "```",
            *_score_section(facts),
            *_training_section(facts),
            "",
        ]
    )


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = next((name for name in TASK_NAMES if name == facts.settings.get("task")), "custom")
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=html.escape(printable(name)),
            metric_value=score["score"],
            dataset_args={"samples": score["n"]},
        )
        for name, score in facts.scores.get("after", {}).items()
    ]
    more = dict[str, Any](facts.licence)
    more |= {"base_model": facts.base, "base_model_relation": "adapter"} if facts.base_on_hub else {}
    data = ModelCardData(
        model_name=output_folder.last_name(facts.repo),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", *([] if facts.adapter.config.method in _OTHERS else ["tied-lora"]), "megatron_tiedlora"],
        eval_results=results or None,
        **more,
    )
    return str(data.to_yaml()).strip()


def _score_section(facts: CardFacts) -> Iterator[str]:
    rows = [
        f"| {moment} training | {_code(name)} | {score['score']:.2f} | {low:.2f} to {high:.2f} | {score['n']:d} |"
        for moment in ("before", "after")
        for name, score in facts.scores.get(moment, {}).items()
        for low, high in [score["confidence_interval"]]
    ]
    if rows:
        heading = "| | metric | score | 95 % interval | samples |"
        yield from ("", "## Scores", "", heading, "|---|---|---|---|---|", *rows)


def _training_section(facts: CardFacts) -> Iterator[str]:
    if facts.plot is not None:
        yield from ("", "## Loss", "", f"![Training and validation loss over the steps of training]({facts.plot.name})")
    chosen = {}
    for name, value in facts.settings.items():
        # The command names the base separately, and test rows are not used in training.
        if name in _MARKS and _MARKS[name].decides not in ("layout", "nothing") and name not in ("model", "test_file"):
            default = Settings.model_fields[name].default  # None if it depends on other settings
            if value not in (None, list(default) if isinstance(default, tuple) else default):
                chosen[name] = value
    if not chosen:
        return
    if "epochs" in chosen:  # max_steps was computed from epochs, and a run accepts only one of them
        chosen.pop("max_steps", None)
    derived = _derived(chosen, facts)
    chosen = {name: value for name, value in chosen.items() if name not in derived or value != derived[name]}
    chosen |= {name: without_folders(str(chosen[name]), facts.settings) for name in chosen if _MARKS[name].holds}
    words = []
    for name, value in chosen.items():  # `=` joins a value that begins with a dash, so that it is not parsed as a flag
        word = fields.flag_value(value)
        words.append(shlex.quote(f"--{name}={word}") if word.startswith("-") else f"--{name} {shlex.quote(word)}")
    command = f"tiedlora train --model {shlex.quote(facts.base)} {' '.join(words)}"
    # A prompt template may contain newlines and backticks.
    marks = "`" * max(4, 1 + max(map(len, re.findall("`+", command)), default=0))
    yield from ("", "## Training", "", marks, *map(printable, command.split("\n")), marks)
    versions = facts.settings.get("versions")
    if isinstance(versions, dict):
        yield from ("", f"Versions: {', '.join(_code(f'{name} {value}') for name, value in versions.items())}.")


def _derived(chosen: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    """Return, by name, the settings that a run derives from `chosen`; {} if such a run would be rejected."""
    # The settings from the adapter of --init_from are recorded here too, and that adapter may not exist any more.
    left_out = (*_DERIVED, "init_from", "epochs")
    given = {name: value for name, value in chosen.items() if name not in left_out}
    if "max_steps" in facts.settings:
        given["max_steps"] = facts.settings["max_steps"]  # the recorded number, which may be computed from --epochs
    try:
        settings = make_settings({**given, "report_to": "none"})
        plan = plan_run(settings, rank=0, world_size=1, weights=False, source=facts.source)
    except UserError:  # run.yaml may be from a different version
        return {}
    resolved = plan.resolved_settings()
    return {name: resolved[name] for name in _DERIVED}


def without_folders(given: str, settings: Mapping[str, Any]) -> str:
    """Return the value of a flag for files, with each path shortened to its last part.

    Hub ids stay unchanged if `settings`, the content of run.yaml, lists them as hub ids. No file is looked up, because
    a name may have a different meaning on this host than in the run.
    """
    from_hub = settings.get(cli.HUB_NAMES)
    ids = from_hub if isinstance(from_hub, list) else []  # a run.yaml may be edited
    names = map(str.strip, given.split(","))
    return ",".join(name if name.partition(":")[0] in ids else output_folder.last_name(name) for name in names)


def _code(text: str) -> str:
    """Return untrusted text as a code span without active Markdown or HTML. The code span can be used in a table."""
    shown = printable(text).replace("`", "'").replace("|", "/")
    return f"`{shown or ' '}`"
