"""Converts the segments of samples to token ids and labels, in the same way for training and for generation.

The tokens of a sample are its start tokens and the tokens of its segments, which may end with EOS. By default, the
start tokens are those that the tokenizer adds before a text, usually BOS or none. Segments are tokenised separately, so
that the ids of a prompt do not depend on the answer. Supervised tokens are marked by position and not by id, because
the padding id may equal the EOS id. If a sample is too long, the middle of its prompt or the first exchanges of its
chat are removed. An answer is never shortened. A long text without a prompt becomes several samples. No space is added
between two segments.

The module `loader` makes batches, `cache` stores samples, and `chat` converts chats to text.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from itertools import chain, compress, islice, pairwise, product
from multiprocessing import active_children, current_process, get_context
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.child_process import end_with_parent
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.batch import filled
from megatron_tiedlora.data.chat import Chat
from megatron_tiedlora.data.sources import NumberedRow
from megatron_tiedlora.data.splits import Encoding, check_shape, make_example
from megatron_tiedlora.data.tables import num_bytes
from megatron_tiedlora.data.task import Example, Reading, Segment
from megatron_tiedlora.data.token_dataset import FACTS, TokenDataset, check_supervised
from megatron_tiedlora.data.tokenizer import Tokenizer, start_ids, tokenizer_errors


class Encoded(NamedTuple):
    """A tokenised sample with BOS and EOS. `supervised` has a flag per token; the first token is never supervised.
    `cut` is whether the middle of the prompt was removed. `lost_turns` is the number of turns removed from a chat."""

    tokens: list[int]
    supervised: list[bool]
    cut: bool = False
    lost_turns: int = 0


def encode_prompts(
    tokenizer: Tokenizer, examples: Sequence[Example], *, max_length: int, reading: Reading | None = None
) -> tuple[list[NDArray[np.int32]], int]:
    """Return the token ids of each prompt, (length,) int32, and the number of prompts shortened to `max_length`.

    If a prompt is not shortened, its ids are exactly the ids before the last answer in training.
    """
    with closing(Encoder(tokenizer, reading or Reading(), max_length)) as encoder:
        encoded = list(encoder.prompts(examples))
    return [np.asarray(ids, dtype=np.int32) for ids, _ in encoded], sum(cut for _, cut in encoded)


def encode_dataset(
    examples: Sequence[Example], tokenizer: Tokenizer, *, max_length: int, reading: Reading | None = None
) -> TokenDataset:
    """Tokenise samples in memory to at most `max_length` tokens. A text without a prompt may become several samples.

    Raises UserError if the tokenizer has no EOS token but needs one, or if no token is supervised. Also raises
    UserError, with the sample's source, if an answer does not fit in `max_length` with BOS and one token of its prompt.
    """
    with closing(Encoder(tokenizer, reading or Reading(), max_length)) as encoder:
        dataset = TokenDataset(**joined([sample for samples in encoder.samples(examples) for sample in samples]))
    check_supervised(dataset, examples[0].source if examples else "data")
    return dataset


def joined(samples: Sequence[Encoded]) -> dict[str, NDArray[Any]]:
    """Return the arrays of samples, by the names of the arguments of `TokenDataset`."""
    facts = np.zeros(len(samples), FACTS)
    facts["supervised"] = [sum(sample.supervised) for sample in samples]
    for name in ("cut", "lost_turns"):
        facts[name] = [getattr(sample, name) for sample in samples]
    return {
        "tokens": np.fromiter(chain.from_iterable(sample.tokens for sample in samples), np.int32),
        "offsets": np.cumsum([0, *(len(sample.tokens) for sample in samples)]),
        "supervised": np.fromiter(chain.from_iterable(sample.supervised for sample in samples), np.bool_),
        "facts": facts,
    }


class Encoder:
    """Tokenises samples with one tokenizer to at most `max_length` tokens.

    It may run the tokenizer's chat template in a separate process, so `close` must be called.
    """

    def __init__(self, tokenizer: Tokenizer, reading: Reading, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._add_bos = reading.add_bos
        self._start = start_ids(tokenizer, self._add_bos)
        self.chat = Chat(tokenizer, reading)
        self.close = self.chat.close

    def samples(self, examples: Sequence[Example]) -> Iterator[list[Encoded]]:
        """Yield the samples of each example, usually one. A long text without a prompt has several samples."""
        for example, tokens, supervised, lost in self._shortened(examples, lambda example: example.segments):
            if len(tokens) > self._max_length and not example.prompt:
                yield list(self._continued(tokens, supervised))
            else:
                yield [self._cut_prompt(example, tokens, supervised, lost)]

    def prompts(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], bool]]:
        """Yield the token ids of each example's prompt, and whether the prompt was shortened."""
        for _, tokens, _, lost in self._shortened(examples, lambda example: example.segments[: example.num_prompt]):
            cut = len(tokens) > self._max_length
            yield self._without_middle(tokens, room=self._max_length) if cut else tokens, cut or lost > 0

    def _shortened(
        self, examples: Sequence[Example], segments_of: Callable[[Example], Sequence[Segment]]
    ) -> Iterator[tuple[Example, list[int], list[bool], int]]:
        """Yield each example, its tokens, whether each token is supervised, and the number of removed turns."""
        ids = segment_ids(self._tokenizer, [segments_of(example) for example in examples])
        for example, parts in zip(examples, ids, strict=True):
            tokens, supervised = self._put_together(example, segments_of(example), parts)
            shorter, chat = example, example.conversation
            while chat is not None and len(tokens) > self._max_length:
                if (chat := chat.without_first_exchange()) is not None:
                    segments, num_prompt = self.chat.segments(chat, example.source)
                    shorter = replace(example, conversation=chat, segments=segments, num_prompt=num_prompt)
                    (parts,) = segment_ids(self._tokenizer, [segments_of(shorter)])
                    tokens, supervised = self._put_together(example, segments_of(shorter), parts)
            yield example, tokens, supervised, _num_turns(example) - _num_turns(shorter)

    def _put_together(
        self, example: Example, segments: Sequence[Segment], parts: Sequence[list[int]]
    ) -> tuple[list[int], list[bool]]:
        """Return the tokens of a sample, and whether each token is supervised."""
        tokens: list[int] = []
        supervised: list[bool] = []
        for segment, ids in zip(segments, parts, strict=True):
            if segment.ends:
                if (eos := self._tokenizer.eos_token_id) is None:
                    name = self._tokenizer.name_or_path
                    raise UserError(f"{name}: the tokenizer has no end-of-sequence token; give another --tokenizer")
                ids = ids if ids[-1:] == [eos] else [*ids, int(eos)]
            tokens += ids
            supervised += [segment.supervised] * len(ids)
        start = self._start_of(example, tokens)
        tokens, supervised = [*start, *tokens], [*(False for _ in start), *supervised]
        supervised[:1] = [False] * len(supervised[:1])
        return tokens, supervised

    def _start_of(self, example: Example, tokens: list[int]) -> list[int]:
        """Return the ids to add before a sample, or none if `tokens` or the chat template already has them."""
        templated = self.chat.templated and example.conversation is not None
        written = (templated and self._add_bos == "auto") or tokens[: len(self._start)] == self._start
        return [] if written else self._start

    def _continued(self, tokens: list[int], supervised: list[bool]) -> Iterator[Encoded]:
        """Yield samples of the maximum length. The last has at least two tokens, because one token predicts nothing."""
        edges = [*range(0, len(tokens), self._max_length), len(tokens)]
        if edges[-1] - edges[-2] == 1:
            edges[-2] -= 1
        for start, stop in pairwise(edges):
            yield Encoded(tokens[start:stop], [False, *supervised[start + 1 : stop]])

    def _cut_prompt(self, example: Example, tokens: list[int], supervised: list[bool], lost_turns: int) -> Encoded:
        """Return the tokenised sample. If it is too long, the middle of its prompt is removed."""
        cut = len(tokens) > self._max_length
        if cut:
            first = supervised.index(True) if any(supervised) else len(tokens)
            answer, room = tokens[first:], self._max_length - (len(tokens) - first)
            if room < len(self._start_of(example, tokens[len(self._start) :])) + 1:
                raise UserError(
                    f"{example.source}: the answer of {len(answer)} tokens (including EOS) does not fit in "
                    f"max_length {self._max_length} with a prompt before it; raise --max_length or remove the row"
                )
            prompt = self._without_middle(tokens[:first], room=room)
            tokens, supervised = [*prompt, *answer], [*(False for _ in prompt), *supervised[first:]]
        return Encoded(tokens, supervised, cut, lost_turns)

    def _without_middle(self, prompt: list[int], *, room: int) -> list[int]:
        """Return a prompt that is shortened to `room` tokens. Its start tokens are kept, and its middle is removed."""
        start = self._start if prompt[: len(self._start)] == self._start else []
        ids, keep = prompt[len(start) :], max(room - len(start), 0)
        head = (keep + 1) // 2
        return [*start, *ids[:head], *ids[len(ids) - (keep - head) :]]


def _num_turns(example: Example) -> int:
    return 0 if example.conversation is None else len(example.conversation.turns)


# Ids of texts, and texts of ids --------------------------------------------------------------------------------------


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Return the text of token ids. Raises UserError with the tokenizer's name if its library fails."""
    with tokenizer_errors(tokenizer.name_or_path, "the tokenizer cannot decode some token ids"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special))


def adds_prefix_space(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer adds a space before a text (SentencePiece's dummy prefix, `add_prefix_space`)."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return bool(tokens) and tokens[0].startswith(("▁", "Ġ"))


def segment_ids(tokenizer: Tokenizer, samples: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
    """Return the token ids of each segment of each sample, without the EOS tokens that may follow a segment."""
    found: list[list[list[int]]] = [[[] for _ in segments] for segments in samples]
    for follows, plain in product((False, True), repeat=2):
        positions = [
            (number, index)
            for number, segments in enumerate(samples)
            for index, segment in enumerate(segments)
            if segment.plain == plain and any(s.text for s in segments[:index]) == follows
        ]
        texts = [samples[number][index].text for number, index in positions]
        encode = continuation_ids if follows else _ids
        for (number, index), ids in zip(positions, encode(tokenizer, texts, plain=plain), strict=True):
            found[number][index] = ids
    return found


def continuation_ids(tokenizer: Tokenizer, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
    """Return the token ids of texts that follow a prompt. Decoding the ids of prompt and text returns the joined text.

    A tokenizer that prefixes a space would add one to " 42" and to "42". So a leading space is removed, and the
    tokenizer adds it again. A text without a leading space is tokenised after a newline, and the newline's ids are
    removed. If the newline and the text merge into one token, the extra space stays. With `plain`, control tokens in
    the texts are tokenised as plain text."""
    if not texts or not adds_prefix_space(tokenizer):
        return _ids(tokenizer, texts, plain=plain)
    newline = _ids(tokenizer, ["\n"])[0]
    guarded = [text[1:] if text.startswith(" ") else "\n" + text for text in texts]
    encoded = _ids(tokenizer, guarded, plain=plain)
    for index, text in enumerate(texts):
        if not text.startswith(" "):
            ids = encoded[index]
            whole = newline and ids[: len(newline)] == newline
            encoded[index] = ids[len(newline) :] if whole else _ids(tokenizer, [text], plain=plain)[0]
    return encoded


def _ids(tokenizer: Tokenizer, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
    if not texts:
        return []
    more = {"split_special_tokens": True} if plain else {}
    with tokenizer_errors(tokenizer.name_or_path, "cannot encode a text"):
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **more,
        )
    return [list(ids) for ids in encoded["input_ids"]]


# Rows to ids, in chunks -----------------------------------------------------------------------------------------------
#
# Rows are encoded in this process, or in several processes if the data set has many chunks. The result does not depend
# on the number of processes, because chunks are returned in order.

# Maximum rows and bytes per chunk. A chunk is large enough for a tokenizer's threads. Tokenising needs a hundred times
# as much memory as a row, for ids as Python objects and the tokenizer's details of each id.
CHUNK, CHUNK_BYTES = 500, 2**18
_FEW_CHUNKS = 4  # up to this many chunks are encoded in this process, because starting others takes longer
_MOST_PROCESSES = 32


Arrays = dict[str, NDArray[Any]]
RowShapes = list[tuple[str, str]]
"""The shape and the source of each row of a chunk."""


class RowEncoder(Encoder):
    """Tokenises chunks of rows."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__(encoding.tokenizer, encoding.reading, encoding.max_length)
        self._task, self._ends, self._check = encoding.task, encoding.end_ids, encoding.check

    def encode(self, rows: Sequence[NumberedRow]) -> tuple[Arrays, RowShapes]:
        """Return the samples of a chunk of rows as the arrays that `encoded_rows` yields, and the shapes of the rows.

        Raises UserError as `make_example` and `Encoder.samples` do.
        """
        made = [make_example(self._task, self.chat, [row]) for _, _, row in rows]
        of_rows = list(self.samples(made))
        samples = [sample for parts in of_rows for sample in parts]
        for example, parts in zip(made, of_rows, strict=True):
            self._check(chain.from_iterable(sample.tokens for sample in parts), example.source)
        arrays = joined(samples)
        facts, counts = arrays["facts"], [len(parts) for parts in of_rows]
        facts["chat"] = np.repeat([example.conversation is not None for example in made], counts)
        facts["first"][np.cumsum([0, *counts[:-1]])] = True
        facts["source"], facts["number"] = (np.repeat([row[index] for row in rows], counts) for index in (0, 1))
        for index in np.flatnonzero(facts["chat"]):
            tokens, supervised = samples[index].tokens, samples[index].supervised
            facts["ended"][index] = not self._ends.isdisjoint(compress(tokens, supervised))
        return arrays, [(example.shape, example.source) for example in made]


def encoded_rows(rows: Iterable[NumberedRow], encoding: Encoding) -> Iterator[Arrays]:
    """Yield the samples of rows in order, chunk by chunk, as arrays named as in `joined`, with all `FACTS`. Raises
    UserError if `RowEncoder.encode` raises it, or if the rows of a file have different shapes."""
    # Each row counts as at least 1 / CHUNK of CHUNK_BYTES, so no chunk has more than CHUNK rows.
    chunks = filled((row, max(num_bytes(row[-1][0]), CHUNK_BYTES / CHUNK), CHUNK_BYTES) for row in rows)
    first = list(islice(chunks, _FEW_CHUNKS + 1))
    # A daemonic process, for example of a multiprocessing pool, is not allowed to start processes.
    several = len(first) > _FEW_CHUNKS and not current_process().daemon
    first_rows: dict[str, tuple[str, str]] = {}
    for arrays, shapes in (_in_processes if several else _in_this_process)(chain(first, chunks), encoding):
        for shape, source in shapes:
            check_shape(shape, source, first_rows)
        yield arrays


def _in_this_process(chunks: Iterable[list[NumberedRow]], encoding: Encoding) -> Iterator[tuple[Arrays, RowShapes]]:
    with closing(RowEncoder(encoding)) as encoder:
        yield from map(encoder.encode, chunks)


# In forked processes ----------------------------------------------------------------------------------------------

_ENCODER: ContextVar[RowEncoder] = ContextVar("the encoder of a process that tokenises rows")


def _in_processes(chunks: Iterable[list[NumberedRow]], encoding: Encoding) -> Iterator[tuple[Arrays, RowShapes]]:
    """Encode chunks in several processes, and yield them in order. At most one chunk per process is in memory."""
    count = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    begin = partial(_begin, encoding, os.getpid())
    pool = ProcessPoolExecutor(count, get_context("fork"), initializer=begin)
    others, waiting = set(active_children()), deque[tuple[list[NumberedRow], Future[tuple[Arrays, RowShapes]]]]()
    try:
        for chunk in chunks:
            if len(waiting) == count:
                yield _result(*waiting.popleft())
            try:
                waiting.append((chunk, pool.submit(_encode, chunk)))
            except OSError as error:  # raised by the first submit, which starts processes
                raise UserError(f"cannot start a process to tokenise rows ({error}); end other programs") from error
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool:
        raise UserError("a process that tokenises rows was killed; start the run again with more memory") from None
    finally:  # after a signal or an error, submitted chunks are not waited for
        for process in set(active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _result(chunk: list[NumberedRow], future: Future[tuple[Arrays, RowShapes]]) -> tuple[Arrays, RowShapes]:
    try:
        return future.result()
    except RecursionError:  # raised by pickle, which sends the chunk
        first, last = (source for _, _, (_, source) in (chunk[0], chunk[-1]))
        raise UserError(f"{first} to {last}: a row has values that are nested too deeply; remove it") from None


def _begin(encoding: Encoding, parent: int) -> None:
    """Prepare a process that tokenises rows."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # only the parent handles a process group's signals
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork lacks the threads of the library and would wait for them
    _ENCODER.set(RowEncoder(encoding))


def _encode(rows: list[NumberedRow]) -> tuple[Arrays, RowShapes]:
    return _ENCODER.get().encode(rows)
