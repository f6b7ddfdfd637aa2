"""Makes the samples of a split: converts rows from files, the hub or a generator to examples of a task.

This module selects validation rows among the training rows, merges the rows of a sample, and makes the checks that all
tasks share. The module `sources` finds and reads files, the task interprets a row, and `chat` converts chats to text.
The function `task.join_answer` adds the leading space of an answer.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.messages import UserError, shown, user_path
from megatron_tiedlora.data.chat import Chat, read_chat_template, with_marks, without_marks
from megatron_tiedlora.data.readers import checked_files, checked_text, describe_fields, looks_like_path
from megatron_tiedlora.data.sources import Files, RowStream, mixed, parse_sources, row_stream, source_kind
from megatron_tiedlora.data.tables import Row
from megatron_tiedlora.data.task import DataSettings, Example, Parts, Reading, Split, Task, join_answer, template_fields
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.token_dataset import permutation
from megatron_tiedlora.data.tokenizer import Tokenizer, check_vocabulary, end_ids, load_tokenizer
from megatron_tiedlora.data.turns import ASSISTANT

_CARVE_STREAM = 2**32  # the random stream that selects held-out rows; epoch e uses the stream e


def load_split(
    task: str | Task,
    split: Split,
    *,
    files: Files,
    seed: int,
    tokenizer: Any = None,
    limit: int | None = None,
    reading: Reading | None = None,
) -> list[Example]:
    """Return the samples of one split in file order, at most the first `limit` samples.

    The rows are read from `files[split]`. If no split has a file, rows come from the task's own source (hub or
    generator). If there is no validation split, validation rows are drawn from the train split with `seed` and removed
    from it. Held-out rows of one sample (see `Task.merge_by`) become one example with all their references. In the
    train split every row is an example, and rows are repeated if the files have weights.

    Raises UserError if the task is unknown, if the split has no source, or if a file is unreadable. Also raises
    UserError if a field is missing, empty or unknown, or if the rows of a file have different shapes.
    """
    entry, reading = get_task(task) if isinstance(task, str) else task, reading or Reading()
    samples = _samples(entry, split, files=files, seed=seed, reading=reading)
    first_rows, examples = dict[str, tuple[str, str]](), []
    with closing(Chat(tokenizer, reading)) as chat:
        for sample in islice(samples, limit):
            examples.append(example := make_example(entry, chat, sample))
            check_shape(example.shape, example.source, first_rows)
    return examples


def read_split(settings: DataSettings, split: Split, *, tokenizer: Any, limit: int | None = None) -> list[Example]:
    """Return the samples of a split with `load_split`, which gets its arguments from a command's settings."""
    return load_split(
        settings.task,
        split,
        files=files_of(settings),
        seed=settings.seed if settings.split_seed is None else settings.split_seed,
        tokenizer=tokenizer,
        limit=limit,
        reading=Reading.of(settings),
    )


@dataclass(frozen=True)
class Encoding:
    """All inputs that determine the token ids of a row.

    end_ids: the token ids that end an answer.
    vocab_size: the number of rows of the model's embedding.
    """

    task: Task
    tokenizer: Tokenizer
    reading: Reading
    max_length: int
    end_ids: frozenset[int]
    vocab_size: int

    def check(self, ids: Iterable[int], source: str) -> None:
        """Raise UserError, with `source`, if the embedding has no row for one of these token ids."""
        if (largest := max(ids, default=0)) >= self.vocab_size:
            raise UserError(f"{source}: no embedding for {self.tokenizer.convert_ids_to_tokens(largest)!r}; remove it")


def open_encoding(settings: DataSettings, model_folder: Path, *, vocab_size: int, max_length: int) -> Encoding:
    """Return the encoding of a command's settings. The default tokenizer is the model's. --chat_template replaces its
    chat template.

    Raises UserError if the tokenizer cannot be read or has no end token, or if one of its ids exceeds the `vocab_size`
    rows of the embedding.
    """
    tokenizer = load_tokenizer(settings.tokenizer or model_folder)
    if settings.chat_template is not None:
        tokenizer.chat_template = read_chat_template(settings.chat_template)
    check_vocabulary(tokenizer, vocab_size)
    ends = end_ids(tokenizer, model_folder, vocab_size=vocab_size)
    return Encoding(get_task(settings.task), tokenizer, Reading.of(settings), max_length, ends, vocab_size)


def files_of(settings: DataSettings) -> Files:
    """Return the values of the data flags in a command's settings, by split."""
    return {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}


def local_names(settings: DataSettings) -> Iterator[str]:
    """Yield the paths and patterns in the data flags. Hub ids are skipped, and so are all files of a task with its own
    file format. Raises UserError if the value of a flag is not valid."""
    files = {} if get_task(settings.task).read_files is not None else files_of(settings)
    for split, given in files.items():
        for source in parse_sources(str(given), f"--{split}_file") if given else ():
            if looks_like_path(source.name) or user_path(source.name).exists():
                yield source.name


def check_files_exist(settings: DataSettings) -> None:
    """Raise UserError if a file in a data flag or --chat_template does not exist. This check needs no slow imports."""
    for name in local_names(settings):
        if not (path := user_path(name)).exists():
            checked_files(path, name)
    if settings.chat_template is not None:
        read_chat_template(settings.chat_template)


def _samples(task: Task, split: Split, *, files: Files, seed: int, reading: Reading) -> Iterable[list[Row]]:
    """Return the rows of each sample of a split, in file order of the samples' first rows. In the train split every row
    is a sample, and rows are repeated if the files have weights."""
    carves = split != "test" and source_kind(task, "validation", files) == "carve"
    stream = row_stream(task, "train" if carves else split, files=files, reading=reading)
    found = list(stream) if split == "train" else None
    held_out: NDArray[np.bool_] | None = None
    if carves:
        numbers = np.array([number for _, number, _ in (stream if found is None else found)])
        held_out = held_out_rows(stream, numbers, seed=seed, required=found is None)
    if found is not None:
        sizes = np.bincount([source for source, _, _ in found], minlength=len(stream.sources)).tolist()
        order, _ = mixed(stream.sources, sizes, np.zeros(len(found), bool) if held_out is None else held_out, seed=seed)
        return ([found[row][-1]] for row in order.tolist())
    samples = dict[int, list[Row]]()
    # With strict=True, a file whose length has changed since the first reading is an error.
    for (_, number, row), taken in zip(stream, repeat(True) if held_out is None else held_out, strict=carves):
        if taken:
            samples.setdefault(number, []).append(row)
    return samples.values()


def held_out_rows(
    stream: RowStream, numbers: NDArray[np.int64], *, seed: int, required: bool = True
) -> NDArray[np.bool_]:
    """Return whether each train row is used for validation, (num_rows,) bool. A single sample is never used.

    The rows of a sample stay together, so that a model is not evaluated on its training data. `numbers`, (num_rows,),
    has the sample index of each row of `stream`. Raises UserError if `required` and no row is held out."""
    num_samples, most = int(numbers.max()) + 1, stream.task.validation_rows
    count = most if num_samples >= 10 * most else min(max(1, num_samples // 20), num_samples - 1)
    if required and not count:
        name = stream.sources[0].name
        raise UserError(f"{name}: with only one sample, no validation set can be held out; give --validation_file")
    taken = np.zeros(num_samples, dtype=bool)
    taken[permutation(num_samples, seed=seed, stream=_CARVE_STREAM)[:count]] = True
    return taken[numbers]


# From rows to examples ------------------------------------------------------------------------------------------------


def check_shape(shape: str, source: str, first_rows: dict[str, tuple[str, str]]) -> None:
    """Raise UserError if a row's shape differs from the shape of its file's first row. `first_rows` has the shape and
    source of the first row of each file, and is updated for a new file."""
    expected, first = first_rows.setdefault(source.rpartition(":")[0], (shape, source))
    if shape != expected:
        said = f"{source}: the row has shape {shape}, but the first row of the file ({first}) has shape {expected}"
        raise UserError(f"{said}; put each shape into a separate file")


def make_example(task: Task, chat: Chat, sample: Sequence[Row]) -> Example:
    """Return an example with the prompt and answer of a sample's first row, and the references of all its rows. Raises
    UserError, with file and line, if a field of the task or template is missing, empty or of the wrong type."""
    parts, source = [_parts(task, chat.reading, *row) for row in sample], sample[0][1]
    first = parts[0]
    references = tuple(dict.fromkeys(answer.strip() for row_parts in parts for answer in row_parts.answers))
    make = partial(Example, source=source, references=references, shape=first.shape)
    if first.conversation is not None and chat.reading.template is None:
        segments, num_prompt = chat.segments(first.conversation, source)
        return make(
            prompt="".join(segment.text for segment in segments[:num_prompt]),
            completion=first.answers[0],
            segments=segments,
            num_prompt=num_prompt,
            conversation=first.conversation,
        )
    prompt = _prompt(task, chat, first, source)
    follows = [chat.guard(ending, "the answer", source) for ending in first.endings]
    answer = chat.guard(first.answers[0], "the answer", source)
    right = first.choices.index(first.answers[0]) if follows else -1
    completion = follows[right] if follows else join_answer(prompt, answer)
    before, after = chat.cut(prompt, False), chat.cut(completion, True, ends=True)
    return make(
        prompt=without_marks(prompt),
        completion=without_marks(completion),
        choices=first.choices,
        endings=tuple(map(without_marks, follows)),
        segments=(*before, *after),
        num_prompt=len(before),
    )


def _parts(task: Task, reading: Reading, row: Mapping[str, Any], source: str) -> Parts:
    for name in task.fields:
        if row.get(name) is None:
            expected = ", ".join(repr(field) for field in task.fields)
            found = f"{source}: field {name!r} is missing; the row has {describe_fields(row)}"
            fix = "name your fields with --columns OURS=YOURS[,...]"
            raise UserError(f"{found}, and task {task.name} reads {expected}; {fix}")
    parts = task.parts(row, source, reading)
    if not parts.answers:
        raise UserError(f"{source}: the row has no answer; add an answer, or remove the row")
    return parts


def _prompt(task: Task, chat: Chat, parts: Parts, source: str) -> str:
    """Return the prompt of a row from the task or a template, with marks around control tokens that are plain text."""
    reading, guard = chat.reading, chat.guard
    template = reading.template or task.template
    if reading.template is None and parts.prompt is not None:
        prompt = guard(parts.prompt, "field 'prompt'", source)
    else:
        names, written, conversation = template_fields(template), dict[str, str](), parts.conversation
        if conversation is not None:
            several = sum(turn.message["role"] == ASSISTANT for turn in conversation.turns) > 1
            if several and reading.train_on != "last_turn":
                said = f"{source}: --prompt_template makes one prompt and one answer from a chat"
                raise UserError(f"{said}; also give --train_on last_turn")
            segments, num_prompt = chat.segments(conversation, source)
            written["prompt"] = with_marks(segments[:num_prompt])
        texts = {name: value for name, value in parts.fields.items() if name in names and isinstance(value, str)}
        guarded = {name: guard(value, f"field {name!r}", source) for name, value in texts.items()}
        fields = {**parts.fields, **guarded, **written}
        for name in names if reading.template is not None else ():
            if name not in fields:
                said = f"--prompt_template: {source} has no field {name!r}; use one of"
                raise UserError(f"{said} {', '.join(sorted(fields)) or 'none'}")
            if not isinstance(fields[name], str):
                said = f"--prompt_template: {source}: field {name!r} is {shown(fields[name])}, not text"
                raise UserError(f"{said}; use another field")
            checked_text(fields[name], name, source, allow_empty=True)
        prompt = template.format_map(fields)
    if not prompt and parts.shape != "text":
        raise UserError(f"{source}: the prompt is empty; check the fields or --prompt_template")
    return prompt
