"""Rows to token ids, in chunks: in this process, or in several for a data set of many chunks.

What comes out does not depend on the number of processes, since chunks are returned in order.
"""

from __future__ import annotations

import os
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain, cycle, islice
from multiprocessing import Pipe, current_process, get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.child_process import end_with_parent, leave_signals_to_parent
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.chat import Chat
from megatron_tiedlora.data.encode import EncodedExample, Encoder, joined
from megatron_tiedlora.data.example_maker import ExampleMaker, OneShape
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.tables import Row
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


@dataclass(frozen=True)
class EncodedRows:
    """The samples of a chunk of rows.

    arrays: as `encode.joined` returns them.
    samples: (rows,) int64, the number of samples of each row.
    shapes: (shape, source) of the first row and of each whose shape or file differs from the row before.
    templated: whether a chat template wrote any text. ended: whether any text that it wrote has a supervised end.
    chats: whether there is any conversation.
    """

    arrays: dict[str, NDArray[Any]]
    samples: NDArray[np.int64]
    shapes: tuple[tuple[str, str], ...]
    chats: bool
    templated: bool
    ended: bool


class RowEncoder:
    """Encodes chunks of rows. It may run the tokenizer's chat template, so it has to be closed."""

    def __init__(self, encoding: Encoding) -> None:
        self._ends = np.array(sorted(encoding.end_ids), dtype=np.int32)
        self._chat = Chat(encoding.tokenizer, encoding.reading)
        self._maker = ExampleMaker(encoding.task, template=encoding.template, chat=self._chat)
        self._encoder = Encoder(encoding.tokenizer, self._chat, encoding.max_length)

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """The samples of rows. Raises UserError as `ExampleMaker.example` and `Encoder.samples` do."""
        made = [self._maker.example([row]) for row in rows]
        shapes: list[tuple[str, str]] = []
        for example, shape in made:
            if not shapes or (shape, _file(example.source)) != (shapes[-1][0], _file(shapes[-1][1])):
                shapes.append((shape, example.source))
        samples = list(self._encoder.samples([example for example, _ in made]))
        by_template = [parts for (example, _), parts in zip(made, samples, strict=True) if example.templated]
        return EncodedRows(
            arrays=joined([part for parts in samples for part in parts]),
            samples=np.array([len(parts) for parts in samples], np.int64),
            shapes=tuple(shapes),
            chats=any(example.conversation is not None for example, _ in made),
            templated=bool(by_template),
            ended=any(self._is_ended(part) for parts in by_template for part in parts),
        )

    def close(self) -> None:
        """End the template's process."""
        self._chat.close()

    def _is_ended(self, sample: EncodedExample) -> bool:
        return bool(np.isin(sample.tokens[sample.supervised], self._ends).any())


def encoded_rows(chunks: Iterable[list[Row]], encoding: Encoding) -> Iterator[EncodedRows]:
    """Yield the samples of each chunk of rows, in order.

    Raises:
        UserError: as `RowEncoder.encode`, or if rows of a file have several shapes.
    """
    chunks = iter(chunks)
    first = list(islice(chunks, _FEW_CHUNKS + 1))
    # A process of multiprocessing's pool, or another daemonic one, may not start processes.
    several = len(first) > _FEW_CHUNKS and not current_process().daemon
    one_shape = OneShape()
    for found in (_in_processes if several else _in_this_process)(chain(first, chunks), encoding):
        for shape, source in found.shapes:
            one_shape.check(shape, source)
        yield found


def _in_this_process(chunks: Iterable[list[Row]], encoding: Encoding) -> Iterator[EncodedRows]:
    with closing(RowEncoder(encoding)) as encoder:
        yield from map(encoder.encode, chunks)


def _in_processes(chunks: Iterable[list[Row]], encoding: Encoding) -> Iterator[EncodedRows]:
    """Every process takes the next chunk in turn, so results come in order, and one chunk for each is in memory."""
    workers = [_Worker(encoding) for _ in range(min(len(os.sched_getaffinity(0)), _MOST_PROCESSES))]
    try:
        waiting: deque[_Worker] = deque()
        for chunk, worker in zip(chunks, cycle(workers), strict=False):
            if len(waiting) == len(workers):
                yield waiting.popleft().result()
            worker.give(chunk)
            waiting.append(worker)
        yield from (worker.result() for worker in waiting)
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """A forked process with its own encoder. It holds one chunk at a time."""

    def __init__(self, encoding: Encoding) -> None:
        self._connection, theirs = Pipe()
        self._process = get_context("fork").Process(target=_serve, args=(encoding, theirs, os.getpid()), daemon=True)
        try:
            self._process.start()
        except OSError as error:
            raise UserError(f"no process to tokenise rows can be started ({error}); end other programs") from error
        theirs.close()

    def give(self, rows: list[Row]) -> None:
        try:
            self._connection.send(rows)
        except RecursionError:
            first, last = rows[0][1], rows[-1][1]
            raise UserError(f"{first} to {last}: a row has values that are nested too deeply; remove it") from None
        except BrokenPipeError:  # it has ended, which `result` reports
            return

    def result(self) -> EncodedRows:
        """The samples of the rows that were given last. Raises UserError as `RowEncoder.encode`."""
        try:
            found = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            status = self._process.exitcode
            raise UserError(f"a process that tokenises rows ended ({status}); start again with more memory") from None
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, EncodedRows)
        return found

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


def _serve(encoding: Encoding, connection: Connection, parent: int) -> None:
    """In the process: encode chunks until the other end is closed."""
    leave_signals_to_parent()
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork has none of the library's threads, and would wait for them
    encoder = RowEncoder(encoding)
    with suppress(EOFError, ConnectionError):
        while True:
            rows = connection.recv()
            try:
                connection.send(encoder.encode(rows))
            except UserError as error:
                connection.send(UserError(str(error)))
            except Exception as error:  # a bug, which the parent reports with the place where it was found
                connection.send(RuntimeError("".join(traceback.format_exception(error))))


def _file(source: str) -> str:
    return source.rpartition(":")[0]
