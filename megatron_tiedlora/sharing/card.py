"""The model card of an exported adapter: its base, method, scores, the command that trained it, and versions."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_tiedlora.base.errors import UserError, printable
from megatron_tiedlora.base.paths import last_name
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.data_fields import HUB_NAMES
from megatron_tiedlora.config.fields import declared, flag_value, marked
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.config.tasks import TASK_NAMES
from megatron_tiedlora.training.plan import plan_run

_TIED = "[Tied-LoRA](https://arxiv.org/abs/2311.09578)"
_OTHERS = {"lora": "[LoRA](https://arxiv.org/abs/2106.09685)", "vera": "[VeRA](https://arxiv.org/abs/2310.11454)"}
_MARKS = declared(Settings)
# Settings that a run derives from others and from its model, if they are not given.
_DERIVED = marked(Settings, derived=True)


@dataclass(frozen=True)
class CardFacts:
    """What a card says of an adapter.

    Attributes:
        repo: OWNER/NAME.
        source: the base itself.
        base: hub id or name of the base.
        base_on_hub: whether `base` is a hub id.
        settings: content of run.yaml; empty if there is none.
        scores: content of scores.json.
    """

    repo: str
    adapter: NativeAdapter
    source: ModelSource
    base: str
    base_on_hub: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The text of README.md, with the metadata in front that the hub reads."""
    config = facts.adapter.config
    targets = ", ".join(target.name for target in config.targets)
    trained = sum(config.num_trained().values())
    return "\n".join(
        [
            "---",
            _metadata(facts),
            "---",
            "",
            f"# {last_name(facts.repo)}",
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
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({facts.base!r})",
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
    base: dict[str, Any] = {"base_model": facts.base, "base_model_relation": "adapter"} if facts.base_on_hub else {}
    data = ModelCardData(
        model_name=last_name(facts.repo),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", *([] if facts.adapter.config.method in _OTHERS else ["tied-lora"]), "megatron_tiedlora"],
        eval_results=results or None,
        **base,
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
    chosen = {
        name: value
        for name, value in facts.settings.items()
        if name in _MARKS and _decides_training(name) and value not in (None, _default(name))
    }
    if not chosen:
        return
    if "epochs" in chosen:  # the steps were counted from them, and a run takes only one of both
        chosen.pop("max_steps", None)
    derived = _derived(chosen, facts)
    chosen = {name: value for name, value in chosen.items() if name not in derived or value != derived[name]}
    chosen |= {name: without_folders(str(chosen[name]), facts.settings) for name in chosen if _MARKS[name].holds}
    words = [_flag(name, flag_value(value)) for name, value in chosen.items()]
    command = f"tiedlora train --model {shlex.quote(facts.base)} {' '.join(words)}"
    # A template of prompts may have lines and marks of its own.
    marks = "`" * max(4, 1 + max(map(len, re.findall("`+", command)), default=0))
    yield from ("", "## Training", "", marks, *map(printable, command.split("\n")), marks)
    versions = facts.settings.get("versions")
    if isinstance(versions, dict):
        yield from ("", f"Versions: {', '.join(_code(f'{name} {value}') for name, value in versions.items())}.")


def _derived(chosen: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    """What a run with the settings `chosen` would derive itself, by name; empty if it would reject them."""
    # The adapter of --init_from decides what is recorded here too, and need not be there any more.
    left_out = (*_DERIVED, "init_from", "epochs")
    given = {name: value for name, value in chosen.items() if name not in left_out}
    if "max_steps" in facts.settings:
        given["max_steps"] = facts.settings["max_steps"]  # also those that --epochs gave
    try:
        settings = make_settings({**given, "report_to": "none"})
        plan = plan_run(settings, rank=0, world_size=1, weights=False, source=facts.source)
    except UserError:  # run.yaml may be of another version
        return {}
    resolved = plan.resolved_settings()
    return {name: resolved[name] for name in _DERIVED}


def _decides_training(name: str) -> bool:
    """Whether a setting decides what was trained. The base is named otherwise, and test rows train nothing."""
    return _MARKS[name].decides not in ("layout", "nothing") and name not in ("model", "test_file")


def _default(name: str) -> Any:
    """A setting's own default; None if it depends on others."""
    default = Settings.model_fields[name].default
    return list(default) if isinstance(default, tuple) else default


def without_folders(given: str, settings: Mapping[str, Any]) -> str:
    """The value of a flag for files without folders: each of its names is shortened to its last part.

    Hub ids stay if `settings`, the content of run.yaml, says that they were some. Nothing is looked up here: what a
    name means on this host, in this folder, is not what it meant to the run.
    """
    from_hub = settings.get(HUB_NAMES)
    ids = from_hub if isinstance(from_hub, list) else []  # earlier versions recorded none
    names = map(str.strip, given.split(","))
    return ",".join(name if name.partition(":")[0] in ids else last_name(name) for name in names)


def _flag(name: str, word: str) -> str:
    """A flag and its value for a shell; `=` joins a value that would be taken for a flag itself."""
    return shlex.quote(f"--{name}={word}") if word.startswith("-") else f"--{name} {shlex.quote(word)}"


def _code(text: str) -> str:
    """A text of a stranger as a code span, in which neither Markdown nor HTML means anything; also in a table."""
    shown = printable(text).replace("`", "'").replace("|", "/")
    return f"`{shown or ' '}`"
