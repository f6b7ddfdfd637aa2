"""A task is one small record: where its rows are, how a prompt is built, and how answers are scored.

Owns the record's class, the choices of users about rows, and the samples as text that come of both, with the one rule
that joins an answer to its prompt. The tasks are in `tasks`, one file each. Leaves reading splits to `splits`, file
formats to `readers`, tokens to `encode`, and the metrics, which are only named here, to the evaluation package.
"""

import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.fields import AddBos, SpecialTokensInText, TrainOn, parse_columns
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.readers import is_text
from megatron_tiedlora.data.tables import HubData, Row
from megatron_tiedlora.data.turns import Conversation

DataSettings = Settings | EvaluateSettings  # of commands that read rows


@dataclass(frozen=True)
class Reading:
    """The choices of users about their rows. The defaults are those of the settings.

    columns: our field -> the user's field; None if rows are read as they are.
    train_on: which answers of a chat are supervised.
    chat_template: the file given in place of the tokenizer's template, for messages.
    add_bos: whether the beginning-of-sequence token is put in front.
    special_tokens: what control tokens in a row's texts mean.
    template: --prompt_template, in which each typed \\n becomes a newline: a shell's quotes hold none.
    trains: whether rows are trained on; else their last answers are scored, also those that are not to be trained.
    """

    columns: Mapping[str, str] | None = None
    train_on: TrainOn = "all_turns"
    chat_template: str | None = None
    add_bos: AddBos = "auto"
    special_tokens: SpecialTokensInText = "refuse"
    template: str | None = None
    trains: bool = True

    def __post_init__(self) -> None:
        r"""Replace each typed \n of the template. Raises UserError if it is not text with {field} names."""
        template, said = self.template or "", f"--prompt_template {self.template!r}"
        try:
            names = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise UserError(f"{said}: {error}; write {{field}}, or {{{{ for a brace") from error
        if not is_text(template):
            raise UserError(f"{said}: holds half of a surrogate pair, which is not text; remove it")
        for name, spec, conversion in names:
            if not (name or "").isidentifier() or spec or conversion:
                raise UserError(f"{said}: {{{name}}} is not a plain {{field}} name; write {{{{ for a brace")
        object.__setattr__(self, "template", template.replace("\\n", "\n") or None)

    @classmethod
    def of(cls, settings: DataSettings) -> "Reading":
        """The choices in a command's settings. A choice that is left to an adapter's run has its default if there is
        none."""
        return cls(
            columns=parse_columns(settings.columns),
            train_on=settings.train_on if isinstance(settings, Settings) else "last_turn",
            chat_template=settings.chat_template,
            add_bos=settings.add_bos or cls.add_bos,
            special_tokens=settings.special_tokens_in_text or cls.special_tokens,
            template=settings.prompt_template,
            trains=isinstance(settings, Settings),
        )


def template_fields(template: str | None) -> tuple[str, ...]:
    """The fields that a checked template names; none without one."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None)


Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Parts:
    """The parts that a task makes from one row.

    fields: what a prompt template may name: the row's own fields without the answer.
    prompt: the prompt if the task builds it itself; None: fill the template.
    answers: accepted texts, at least one; training uses the first.
    choices: all choices in the row's order, including the first answer; empty if the task has no choices.
    endings: the choices as they follow the prompt; by default each after one space.
    conversation: the turns of a chat, which has neither prompt nor answer of its own.
    shape: the name of the row's shape, which all rows of a file share; '' for tasks with rows of one shape.
    """

    fields: Mapping[str, Any]
    prompt: str | None
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    conversation: Conversation | None = None
    shape: str = ""


@dataclass(frozen=True)
class Task:
    """One task.

    name: the name of its file.
    fields: fields that every row must have, also for messages; empty if rows have several shapes.
    template: the prompt with {field} names; empty if `parts` builds the prompt itself.
    parts: (row, source, what the user decided about rows) -> `Parts`; raises UserError naming source and field.
    metrics: names of metrics in the evaluation package; the first is the task's own.
    stop: a prediction ends before this text; None: only end-of-sequence ends it.
    hub: the task's own rows by our split, all of one data set; without validation, it is carved from train. None if
        there are only the user's.
    validation_rows: how many rows are carved from a large train part (from a small one, 5 %).
    merge_by: held-out rows with the same value of this field are one sample with several references.
    unfold: (row, source) -> flat rows, for files with nested rows.
    read_files: (argument, flag) -> a function that reads rows, for formats that only this task
        has; None: read it like any other file.
    generate: split -> rows, for a task without files; independent of the run's seed, so that scores are comparable.
    scored_rows: how many test rows are answered by default, also before and after training. None: all of them, and in
        training only those of a file that is given.
    max_new_tokens: the default of --max_new_tokens.
    micro_batch_rows: the default of --micro_batch_size, except with packing on a GPU (see `default_rows`).
    exports_merged: whether a run also merges its adapter at the end, and verifies its exports.
    fp32_on_slow_cpus: whether --dtype is fp32 by default on CPUs without instructions for bf16.
    known_fields: every field of rows that have several shapes, which --columns must name; empty: it may name any.
    """

    name: str
    fields: tuple[str, ...]
    template: str
    parts: Callable[[Mapping[str, Any], str, Reading], Parts]
    metrics: tuple[str, ...]
    stop: str | None = None
    hub: Mapping[str, HubData] | None = None
    validation_rows: int = 500
    merge_by: str | None = None
    unfold: Callable[[Mapping[str, Any], str], Iterator[Row]] | None = None
    read_files: Callable[[str, str], Callable[[], Iterable[Row]] | None] | None = None
    generate: Callable[[Split], Iterable[Row]] | None = None
    scored_rows: int | None = None
    max_new_tokens: int = 500
    micro_batch_rows: int = 1
    exports_merged: bool = False
    fp32_on_slow_cpus: bool = False
    known_fields: frozenset[str] = frozenset()


# Samples as text ------------------------------------------------------------------------------------------------------
#
# The full text of a sample is that of its segments: prompt + completion, where the completion carries its own leading
# space, or the turns of a conversation.


@dataclass(frozen=True)
class Segment:
    """A part of a sample's text that is tokenised on its own.

    supervised: whether its tokens are learned.
    plain: whether control tokens in it are read as plain text.
    ends: whether an end-of-sequence token follows, which is supervised as the text is.
    """

    text: str
    supervised: bool = False
    plain: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Example:
    """One sample as text.

    prompt: the model's input, without a trailing space; '' for text without a prompt.
    completion: the expected continuation, with its leading space and without the end-of-sequence token.
    source: where it was read, for messages ("train.jsonl:12").
    references: stripped texts that a prediction is scored against; by default the stripped completion.
    choices: texts of a multiple-choice question, including the answer, references[0]; else empty.
    endings: the choices as they follow the prompt; by default each after one space.
    segments: the whole text; by default prompt and completion.
    num_prompt: number of segments before the last answer, which a model sees.
    conversation: the turns that the segments were made of; None if it is no chat.
    shape: the name of its row's shape, as in `Parts`.
    """

    prompt: str
    completion: str
    source: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()
    num_prompt: int = 1
    conversation: Conversation | None = None
    shape: str = ""

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", (self.completion.strip(),))
        if not self.segments:
            both = (Segment(self.prompt), Segment(self.completion, supervised=True, ends=True))
            object.__setattr__(self, "segments", both)


def join_answer(prompt: str, answer: str) -> str:
    """Return the completion that follows `prompt`: the answer after one space.

    Only this function knows the convention. It adds no space if the answer starts with white space, if the prompt
    ends with it (a chat template's generation prompt does), or if the prompt is empty.
    """
    if not prompt or prompt[-1].isspace() or answer[:1].isspace():
        return answer
    return " " + answer
