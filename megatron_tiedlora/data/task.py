"""Defines a task as one small record: where its rows are, how a prompt is built, and how answers are scored.

This module has the record's class, the user's choices about rows, samples as text, and the one rule that joins an
answer to its prompt. The tasks are in `tasks`, one file each. `splits` reads splits, `readers` reads file formats, and
`encode` makes tokens. Metrics are only named here; they are in the evaluation package.
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

DataSettings = Settings | EvaluateSettings  # settings of commands that read rows


@dataclass(frozen=True)
class Reading:
    """The user's choices about the rows. The defaults are the defaults of the flags.

    columns: our field -> the user's field; None if fields are not renamed.
    train_on: which answers of a chat are supervised.
    chat_template: the file that replaces the tokenizer's template; used in messages.
    add_bos: whether the beginning-of-sequence token is added before a text.
    special_tokens: how control tokens in a row's texts are read.
    template: --prompt_template, in which each typed \\n becomes a newline, because a shell does not convert it.
    trains: whether rows are trained on. If not, the last answer of each row is scored, even if it is marked untrained.
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
        """Return the choices in a command's settings. A choice that is not set gets its default."""
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
    """Return the field names in a checked template; empty if the template is None."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None)


Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Parts:
    """The parts that a task makes from one row.

    fields: fields that a prompt template may use: the row's own fields without the answer.
    prompt: the prompt if the task builds it itself; None if the template is filled.
    answers: accepted texts, at least one; training uses the first.
    choices: all choices in the row's order, including the first answer; empty if the task has no choices.
    endings: the texts of the choices after the prompt; by default each choice after one space.
    conversation: the turns of a chat; None if the row is not a chat.
    shape: the name of the row's shape, which all rows of a file share; '' if the task has only one shape.
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
    """A task.

    name: the name of its file.
    fields: fields that every row must have, also used in messages; empty if rows have several shapes.
    template: the prompt with {field} names; empty if `parts` builds the prompt itself.
    parts: (row, source, user's choices) -> `Parts`; raises UserError, which names source and field.
    metrics: names of metrics in the evaluation package; the first is the task's main metric.
    stop: a prediction ends before this text; None: only end-of-sequence ends it.
    hub: the task's hub data by our split, all from one data set. If it has no validation split, validation rows are
        taken from train. None if the task only reads the user's files.
    validation_rows: number of validation rows taken from a large train split (5 % are taken from a small one).
    merge_by: held-out rows with the same value of this field are one sample with several references.
    unfold: (row, source) -> flat rows, for files with nested rows.
    read_files: (argument, flag) -> a function that reads rows, for file formats that only this task has. If it is None
        or returns None, the file is read in one of the common formats.
    generate: split -> rows, for a task without files; independent of the run's seed, so that scores are comparable.
    scored_rows: number of test rows that are answered by default, also before and after training. None: all rows; in
        training, only if a test file is given.
    max_new_tokens: the default of --max_new_tokens.
    micro_batch_rows: the default of --micro_batch_size, except with packing on a GPU (see `default_rows`).
    exports_merged: whether a run also merges its adapter at the end, and verifies its exports.
    fp32_on_slow_cpus: whether --dtype is fp32 by default on CPUs without instructions for bf16.
    known_fields: the only fields that --columns may name, if rows have several shapes; empty: it may name any field.
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
# The full text of a sample is the text of its segments. These are a prompt and a completion with its leading space, or
# the turns of a conversation.


@dataclass(frozen=True)
class Segment:
    """A part of a sample's text that is tokenised on its own.

    supervised: whether its tokens are learned.
    plain: whether control tokens in it are read as plain text.
    ends: whether an end-of-sequence token follows. It is supervised if the text is.
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
    source: file and line of the row, for messages ("train.jsonl:12").
    references: stripped texts that a prediction is scored against; by default the stripped completion.
    choices: texts of a multiple-choice question, including the answer, references[0]; else empty.
    endings: the texts of the choices after the prompt; by default each choice after one space.
    segments: the whole text; by default prompt and completion.
    num_prompt: number of segments before the last answer; a model gets these as its prompt.
    conversation: the turns from which the segments were made; None if the sample is not a chat.
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

    Only this function adds the space. It adds none if the prompt is empty or the answer starts with white space. It
    also adds none if the prompt ends with white space, as a chat template's generation prompt does.
    """
    if not prompt or prompt[-1].isspace() or answer[:1].isspace():
        return answer
    return " " + answer
