"""Defines the class `Task`, which describes where the rows are, how a prompt is built, and how answers are scored.

This module also defines the user's options for reading rows (`Reading`), a sample as text (`Example`), and the function
that joins an answer to its prompt. The tasks are in the package `tasks`, one per file. The module `splits` reads
splits, `readers` reads file formats, and `encode` tokenises samples. The package `evaluation` defines the metrics.
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
    """The user's options for reading rows. The defaults are the defaults of the flags.

    columns: the user's field name for each field name of the task; None if fields are not renamed.
    train_on: which answers of a chat are supervised.
    chat_template: the file that replaces the tokenizer's chat template; used in messages.
    add_bos: whether the beginning-of-sequence token is added before a text.
    special_tokens: how control tokens in the texts of a row are tokenised.
    template: the prompt template. In --prompt_template, the two characters \\n become a newline.
    trains: whether the rows are used for training. If not, the last answer of each row is always scored.
    """

    columns: Mapping[str, str] | None = None
    train_on: TrainOn = "all_turns"
    chat_template: str | None = None
    add_bos: AddBos = "auto"
    special_tokens: SpecialTokensInText = "refuse"
    template: str | None = None
    trains: bool = True

    def __post_init__(self) -> None:
        r"""Replace each \n in the template with a newline. Raises UserError if the template is not valid."""
        template, said = self.template or "", f"--prompt_template {self.template!r}"
        try:
            names = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise UserError(f"{said}: {error}; write {{field}} for a field, or {{{{ for a brace") from error
        if not is_text(template):
            raise UserError(f"{said}: has an invalid character (an unpaired surrogate); remove it")
        for name, spec, conversion in names:
            if not (name or "").isidentifier() or spec or conversion:
                raise UserError(f"{said}: {{{name}}} is not a plain {{field}} name; write {{{{ for a brace")
        object.__setattr__(self, "template", template.replace("\\n", "\n") or None)

    @classmethod
    def of(cls, settings: DataSettings) -> "Reading":
        """Return the options in a command's settings. An option that is not set gets its default."""
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
    """Return the field names in a valid template. Return an empty tuple if the template is None."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None)


Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Parts:
    """The parts that a task makes from one row.

    fields: the fields that a prompt template may use, which are all fields of the row except the answer.
    prompt: the prompt if the task builds it itself; None if it is made from a template.
    answers: the accepted answers, at least one; training uses the first.
    choices: the choices of a multiple-choice row in the row's order, including the correct one; empty for other tasks.
    endings: the text of each choice after the prompt; by default the choice after one space.
    conversation: the turns of a chat; None if the row is not a chat.
    shape: the name of the row's set of fields, which all rows of a file share; '' if the task has only one set.
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
    """A task: its data, its prompts and how its answers are scored.

    name: the name of the task and of its module.
    fields: the fields that every row must have; empty if rows may have different shapes.
    template: the prompt template with {field} names; empty if `parts` builds the prompt itself.
    parts: a function (row, source, user's options) -> `Parts`. It raises UserError with source and field.
    metrics: the names of metrics in the package `evaluation`; the first is the task's main metric.
    stop: the text before which a prediction ends; None if only the end-of-sequence token ends it.
    hub: the hub data of each split, all from one data set; None if there is no hub data. Without a validation split,
        validation rows are taken from the train split.
    validation_rows: the number of validation rows taken from a large train split (5 % are taken from a small one).
    merge_by: the name of a field. Held-out rows with the same value are one sample with several references.
    unfold: a function (row, source) -> flat rows, for files with nested rows.
    read_files: a function (argument, flag) -> a function that reads rows, for file formats that only this task has. If
        it is None or returns None, the file is read in one of the common formats.
    generate: a function split -> rows, for a task without files. The rows do not depend on the run's seed.
    scored_rows: the default number of test rows to generate answers for, also before and after training. If it is None,
        all rows are used, but in training only if a test file is given.
    max_new_tokens: the default of --max_new_tokens.
    micro_batch_rows: the default of --micro_batch_size, except with packing on a GPU (see `default_rows`).
    exports_merged: whether a run also merges its adapter at the end, and verifies its exports.
    fp32_on_slow_cpus: whether --dtype is fp32 by default on CPUs without instructions for bf16.
    known_fields: the only fields that --columns may name, if rows may have different shapes; empty if it may name any.
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
    """A part of a sample's text that is tokenised separately.

    supervised: whether its tokens count in the loss.
    plain: whether control tokens in it are tokenised as plain text.
    ends: whether an end-of-sequence token follows. This token is supervised if the text is.
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
    source: the file and line of the row for messages, such as "train.jsonl:12".
    references: the stripped texts with which a prediction is compared; by default the stripped completion.
    choices: the choices of a multiple-choice question, including the answer, references[0]; otherwise empty.
    endings: the text of each choice after the prompt; by default the choice after one space.
    segments: the segments of the text; by default the prompt and the completion.
    num_prompt: the number of segments before the last answer. These segments are the prompt in an evaluation.
    conversation: the turns from which the segments were made; None if the sample is not a chat.
    shape: the name of the row's shape, as in `Parts`.
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

    No other function adds this space. No space is added if the prompt is empty or the answer starts with white space.
    No space is added either if the prompt ends with white space, as a chat template's generation prompt does.
    """
    if not prompt or prompt[-1].isspace() or answer[:1].isspace():
        return answer
    return " " + answer
