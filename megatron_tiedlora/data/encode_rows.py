"""Rows to token ids, in chunks: in this process, or in several for a data set of many chunks.

What comes out does not depend on the number of processes, since chunks are returned in order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from multiprocessing import active_children, current_process, get_context
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.child_process import end_with_parent, leave_signals_to_parent
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.chat import Chat
from megatron_tiedlora.data.encode import Encoder, joined
from megatron_tiedlora.data.example_maker import ExampleMaker, OneShape
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.tables import Row, num_bytes
from megatron_tiedlora.data.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The most rows of a chunk, or bytes of long rows: enough for a tokenizer's threads. Ids as Python objects and what the
# tokenizer knows of each need a hundred times a row's bytes.
CHUNK, CHUNK_BYTES = 500, 2**18
_FEW_CHUNKS = 4  # are encoded before other processes would have started
_MOST_PROCESSES = 32


@dataclass(frozen=True)
class Encoding:
    """Everything that decides which ids a row becomes.

    template: the checked --prompt_template.
    reading: what the user decided, with the fields of the template.
    end_ids: tokens that end an answer.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    reading: Reading
    template: str | None
    max_length: int
    end_ids: frozenset[int]


NumberedRow = tuple[int, int, Row]
"""The number of a row's source, the row's number by `SampleNumbers`, and the row."""

Arrays = dict[str, NDArray[Any]]
Shapes = list[tuple[str, str]]
"""(shape, source) of each of some rows."""


class RowEncoder:
    """Encodes chunks of rows. It may run the tokenizer's chat template, so it has to be closed."""

    def __init__(self, encoding: Encoding) -> None:
        self._ends = np.array(sorted(encoding.end_ids), dtype=np.int32)
        self._chat = Chat(encoding.tokenizer, encoding.reading)
        self._maker = ExampleMaker(encoding.task, template=encoding.template, chat=self._chat)
        self._encoder = Encoder(encoding.tokenizer, self._chat, encoding.max_length)

    def encode(self, rows: Sequence[NumberedRow]) -> tuple[Arrays, Shapes]:
        """The samples of rows, as `encoded_rows` yields them, and the rows' shapes.

        Raises UserError as `ExampleMaker.example` and `Encoder.samples` do.
        """
        made = [self._maker.example([row]) for _, _, row in rows]
        of_rows = list(self._encoder.samples([example for example, _ in made]))
        samples = [sample for parts in of_rows for sample in parts]
        arrays = joined(samples)
        facts, counts = arrays["facts"], [len(parts) for parts in of_rows]
        facts["chat"] = np.repeat([example.conversation is not None for example, _ in made], counts)
        facts["first"][np.cumsum([0, *counts[:-1]])] = True
        facts["source"], facts["number"] = (np.repeat([row[index] for row in rows], counts) for index in (0, 1))
        for index in np.flatnonzero(facts["chat"]):
            learned = samples[index].tokens[samples[index].supervised]
            facts["ended"][index] = np.isin(learned, self._ends).any()
        return arrays, [(shape, example.source) for example, shape in made]

    def close(self) -> None:
        """End the template's process."""
        self._chat.close()


def encoded_rows(rows: Iterable[NumberedRow], encoding: Encoding) -> Iterator[Arrays]:
    """Yield the samples of rows, chunk by chunk in order: arrays as `encode.joined` returns them, with all facts.

    Raises:
        UserError: as `RowEncoder.encode`, or if rows of a file have several shapes.
    """
    chunks = _chunks(rows)
    first = list(islice(chunks, _FEW_CHUNKS + 1))
    # A process of multiprocessing's pool, or another daemonic one, may not start processes.
    several = len(first) > _FEW_CHUNKS and not current_process().daemon
    one_shape = OneShape()
    for arrays, shapes in (_in_processes if several else _in_this_process)(chain(first, chunks), encoding):
        for shape, source in shapes:
            one_shape.check(shape, source)
        yield arrays


def _chunks(rows: Iterable[NumberedRow]) -> Iterator[list[NumberedRow]]:
    chunk: list[NumberedRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += num_bytes(row[-1][0])
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _in_this_process(chunks: Iterable[list[NumberedRow]], encoding: Encoding) -> Iterator[tuple[Arrays, Shapes]]:
    with closing(RowEncoder(encoding)) as encoder:
        yield from map(encoder.encode, chunks)


# In forked processes ----------------------------------------------------------------------------------------------

_ENCODER: ContextVar[RowEncoder] = ContextVar("the encoder of a process that tokenises rows")


def _in_processes(chunks: Iterable[list[NumberedRow]], encoding: Encoding) -> Iterator[tuple[Arrays, Shapes]]:
    """Chunks are given out and come back in order, and one for each process is in memory."""
    count = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    begin = partial(_begin, encoding, os.getpid())
    pool = ProcessPoolExecutor(count, get_context("fork"), initializer=begin)
    others, waiting = set(active_children()), deque[tuple[list[NumberedRow], Future[tuple[Arrays, Shapes]]]]()
    try:
        for chunk in chunks:
            if len(waiting) == count:
                yield _result(*waiting.popleft())
            try:
                waiting.append((chunk, pool.submit(_encode, chunk)))
            except OSError as error:  # at the first, which starts the processes
                raise UserError(f"no process to tokenise rows can be started ({error}); end other programs") from error
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool:
        raise UserError("a process that tokenises rows was ended; start again with more memory") from None
    finally:  # a signal or an error does not wait for the chunks that were given out
        for process in set(active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _result(chunk: list[NumberedRow], future: Future[tuple[Arrays, Shapes]]) -> tuple[Arrays, Shapes]:
    try:
        return future.result()
    except RecursionError:  # of pickle, which passes the chunk
        first, last = (source for _, _, (_, source) in (chunk[0], chunk[-1]))
        raise UserError(f"{first} to {last}: a row has values that are nested too deeply; remove it") from None


def _begin(encoding: Encoding, parent: int) -> None:
    """Prepare a process that tokenises rows."""
    leave_signals_to_parent()
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of the library's threads, and would wait for them
    _ENCODER.set(RowEncoder(encoding))


def _encode(rows: list[NumberedRow]) -> tuple[Arrays, Shapes]:
    return _ENCODER.get().encode(rows)
