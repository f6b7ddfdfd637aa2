"""Who is still there: every rank beats on the process group's store, rank 0 listens, and all learn who fell silent.

A dead host or a cut link sends nothing, so its peers would wait until the groups' time limit. A beat that stays away
tells of it within seconds. Beats come from a thread of each rank, over a connection of its own to the store that torch
serves for the process group; nothing here opens a port. The first rank to know why the run fails says so on the store,
so that all give the same reason, and one of them shows it. What a rank then does is the caller's.

Torch's store asks nobody who he is. What a stranger writes there ends no thread: what cannot be read was not said.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import DistError, DistNetworkError, PrefixStore, Store, TCPStore

from megatron_tiedlora.base.errors import one_line

SILENCE_SECONDS = 30.0
BEAT_SECONDS = 1.0
_MISSED_BEATS = 4  # after which a rank that is looked for counts as gone: an exchange with somebody has failed
_LEFT, _PARTED = "left", "parted"  # a rank's last beat: after a good end, or one that it has told of
_LOST, _REASON = "lost", "reason"  # keys that rank 0 makes


@dataclass(frozen=True)
class PeerFailure:
    """Why a run ends that a rank did not end.

    Attributes:
        reason: one line, with rank, host and last step.
        reports: whether this rank is the one that found out, and shows it.
    """

    reason: str
    reports: bool


def connect(*, limit: timedelta) -> Store:
    """A connection of one's own to the store that serves the process group.

    Every start of the ranks has a store of its own. torchrun's count of restarts would not tell starts apart: an agent
    whose peer came back starts its ranks anew without counting it, so that hosts disagree on the number.
    """
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(master, port, is_master=False, timeout=limit, wait_for_workers=False)
    return PrefixStore("heartbeat", store)


@dataclass
class Heartbeat:
    """One rank's end of it: `start` once the process group is there, `leave` at a good end.

    Attributes:
        step: the last finished step of this rank.
        on_failure: called once, in a thread, where ranks or the store are lost and this rank does not end by itself.
        reports_for_host: whether this rank shows what no other host can be told of; called at most once.
        silence_seconds: after which a rank that does not beat counts as lost.
    """

    store: Store
    rank: int
    world_size: int
    step: Callable[[], int]
    on_failure: Callable[[PeerFailure], None]
    reports_for_host: Callable[[], bool]
    silence_seconds: float = SILENCE_SECONDS
    beat_seconds: float = BEAT_SECONDS
    _hosts: tuple[str, ...] = ()
    _addresses: tuple[str, ...] = ()
    _threads: tuple[threading.Thread, ...] = ()
    _over: threading.Event = field(default_factory=threading.Event)
    _ends: bool = False  # the main thread knows that the run ends
    _unanswered: int = 0  # looks of `_watch` since the store last answered
    _lost: frozenset[int] = frozenset()
    _reason: str = ""
    _main_left: bool = False
    _main_gone: bool = False

    def start(self) -> Heartbeat:
        """Exchange host names and begin to beat; all ranks take part."""
        if self.rank == 0:
            self.store.set(_LOST, "[]")
            self.store.set(_REASON, "")
        self.store.set(_key(self.rank), "0")
        self.store.set(f"host/{self.rank}", f"{socket.gethostname()} {_own_address()}")  # last: peers wait for it
        told = self.store.multi_get([f"host/{rank}" for rank in range(self.world_size)])
        self._hosts, self._addresses = zip(*map(_place, told), strict=True)
        self._threads = tuple(
            threading.Thread(target=target, name=f"heartbeat{target.__name__}", daemon=True)
            for target in (self._beat_on, self._watch)
        )
        for thread in self._threads:
            thread.start()
        return self

    @property
    def main_lost(self) -> bool:
        """Whether rank 0 fell silent, or took the store away with it."""
        return self._main_gone or 0 in self._lost

    def with_names(self, text: str) -> str:
        """A library's words with who is at an address in its place, `[ADDRESS]`: the rank, or those of the host."""
        for address, host in dict(zip(self._addresses, self._hosts, strict=True)).items():
            there = [rank for rank, other in enumerate(self._addresses) if other == address]
            ranks = f"rank {there[0]}" if len(there) == 1 else f"one of ranks {', '.join(map(str, there))}"
            text = text.replace(f"[{address}]", f"[{ranks} on {host}]") if address else text
        return text

    def leave(self, *, limit: float = 10.0) -> None:
        """This rank ends well; its silence from now on means nothing.

        Its threads end before the interpreter does: one that is in a call of the store then would abort the process.
        """
        self._over.set()
        for thread in self._threads:
            thread.join(limit)
        with suppress(RuntimeError):
            self.store.set(_key(self.rank), _LEFT)

    def leave_after_main(self) -> None:
        """A good end of all: each leaves when rank 0 does, however long that takes.

        Rank 0 may have files to write, and launchers give the others only so long once the first rank has ended. It
        then waits a moment until the others have seen it leave.

        Raises:
            DistNetworkError: the store is gone, and rank 0 with it.
            DistError: the run has failed or been stopped meanwhile, for the reason that it gives.
        """
        pause = self.beat_seconds / 20
        try:
            while self.rank:
                main = _text(self.store.get(_key(0)))  # before the reason, which a rank that fails gives first
                if reason := self._line(self.store.get(_REASON)):
                    raise DistError(reason)
                if main == _LEFT:
                    break
                time.sleep(pause)
                pause = min(1.5 * pause, self.beat_seconds)
        except DistNetworkError:  # what the last beat has seen holds
            if self._reason:
                raise DistError(self._reason) from None
            if not self._main_left:
                raise
        self.leave()
        self.await_others(beats=10)

    def await_main(self, *, limit: float = 5.0) -> None:
        """Wait until rank 0 has left: it has files to write, and launchers end all ranks once the first one has."""
        deadline = time.monotonic() + limit
        with suppress(RuntimeError):
            while self.rank and _text(self.store.get(_key(0))) != _LEFT and time.monotonic() < deadline:
                time.sleep(self.beat_seconds / 10)

    def failed(self, reason: str) -> PeerFailure:
        """Tell all ranks why this one fails; where another has said so already, that reason holds."""
        self._ends = True
        return self._tell(place_line(self.rank, self._host(self.rank), self.step(), reason))

    def explain(self, symptom: str) -> PeerFailure:
        """Why an exchange with peers failed: what one of them has told, or who beats no more, or else the symptom.

        Waits a few beats for it.
        """
        self._ends = True
        deadline = time.monotonic() + self.beat_seconds * _MISSED_BEATS
        here = place_line(self.rank, self._host(self.rank), self.step(), symptom)
        try:
            before = self._beats()
            silent = {rank for rank, beat in before.items() if rank != self.rank and not _ended(beat)}
            while silent and time.monotonic() < deadline and not self._line(self.store.get(_REASON)):
                time.sleep(self.beat_seconds / 4)
                now = self._beats()
                silent = {rank for rank in silent if now[rank] == before[rank]}
        except RuntimeError:
            return self._store_gone()
        self._main_gone = 0 in silent
        return self._tell(self._gone_line(silent) if silent else here)

    def part(self) -> None:
        """The last thing that a failing rank does. Rank 0 waits a few beats.

        By then the others have ended or have read the reason.
        """
        with suppress(RuntimeError):
            self._over.set()
            self.store.set(_key(self.rank), _PARTED)
            self.await_others()

    def await_others(self, *, beats: int = 3) -> None:
        """Rank 0, whose end takes the store away, waits until all others have ended; nobody else waits."""
        deadline = time.monotonic() + beats * self.beat_seconds
        with suppress(RuntimeError):
            while self.rank == 0 and time.monotonic() < deadline:
                if all(_ended(beat) for rank, beat in self._beats().items() if rank not in self._lost):
                    return
                time.sleep(self.beat_seconds / 10)

    def _tell(self, line: str) -> PeerFailure:
        """Give `line` as the reason for all, unless there is one."""
        line = one_line(line)
        mine = f"{self.rank} {line}"
        try:
            said = self.store.compare_set(_REASON, "", mine)
            if not self._line(said):  # no rank's
                said = self.store.compare_set(_REASON, said, mine)  # type: ignore[arg-type]  # takes bytes too
        except RuntimeError:  # the store is gone, and rank 0 with it
            self._main_gone = True
            return PeerFailure(self._reason, False) if self._reason else PeerFailure(line, self.reports_for_host())
        return PeerFailure(self._line(said) or line, said == mine.encode())

    def _line(self, said: bytes) -> str:
        """The reason that a rank has given (`_tell`); "" where none has."""
        rank, _, line = _text(said).partition(" ")
        return one_line(line) if rank in map(str, range(self.world_size)) else ""

    def _host(self, rank: int) -> str:
        return self._hosts[rank] if self._hosts else socket.gethostname()

    def _beats(self) -> dict[int, str]:
        """The last beat of every rank."""
        found = self.store.multi_get([_key(rank) for rank in range(self.world_size)])
        return {rank: _text(beat) for rank, beat in enumerate(found)}

    def _gone_line(self, ranks: Collection[int]) -> str:
        named = ", ".join(f"rank {rank} on {self._host(rank)}" for rank in sorted(ranks)[:8])
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        why = "killed, out of memory, or the host or its link is down"
        return f"{named}{more} fell silent after step {self.step()} ({why})"

    def _store_gone(self) -> PeerFailure:
        """The store went away with rank 0: for the reason that was given before, or nobody knows why."""
        self._main_gone = True
        if self._reason:
            return PeerFailure(self._reason, False)
        line = f"{self._gone_line([0])}, says rank {self.rank} on {self._host(self.rank)}"
        return PeerFailure(line, self.reports_for_host())

    # In threads -------------------------------------------------------------------------------------------------

    def _beat_on(self) -> None:
        """Beat; rank 0 looks who else does, the others whom rank 0 misses, and whether it beats itself."""
        count, heard = 0, dict.fromkeys(range(self.world_size), ("", 0))
        while not self._over.wait(self.beat_seconds):
            count += 1
            try:
                self.store.set(_key(self.rank), str(count))
                if self.rank == 0:
                    self._lost = self._silent(heard, self._beats())
                    self.store.set(_LOST, json.dumps(sorted(self._lost)))
                lost, reason, main = self.store.multi_get([_LOST, _REASON, _key(0)])
                if self.rank:
                    known = self._silent(heard, {0: _text(main)})
                    self._lost = known.union(_ranks(lost, self.world_size)) - {self.rank}
                self._unanswered = 0
                self._main_left, self._reason = _text(main) == _LEFT, self._line(reason)
            except RuntimeError:  # no answer: `_watch` counts
                continue

    @property
    def _patience(self) -> int:
        """Beats that may stay away. They are counted by one's own, not by the clock: a process that was stopped itself
        and goes on (a suspended job, a machine that was paused) has missed nothing."""
        return math.ceil(self.silence_seconds / self.beat_seconds)

    def _silent(self, heard: dict[int, tuple[str, int]], beats: Mapping[int, str]) -> frozenset[int]:
        """The ranks whose beat has not changed for too long; keeps `heard` = {rank: (beat, how often it was seen)}."""
        for rank, beat in beats.items():
            before, times = heard[rank]
            heard[rank] = (beat, times + 1 if beat == before else 1)
        return frozenset(
            rank
            for rank, beat in beats.items()
            if rank != self.rank and not _ended(beat) and heard[rank][1] > self._patience
        )

    def _watch(self) -> None:
        """Call `on_failure` where the run fails elsewhere and the main thread does not end by itself."""
        told = 0
        while not self._over.wait(self.beat_seconds) and not self._main_left:
            self._unanswered += 1
            told += bool(self._reason)
            no_answer = self._unanswered > self._patience
            if not (no_answer or self._lost or told > self._patience):
                continue
            if self._ends and self._over.wait(self.silence_seconds):
                return
            # Nothing is asked of the store here: over a link that is cut it would not return.
            if self._reason or no_answer:
                self.on_failure(self._store_gone())
            else:
                first_left = min(set(range(self.world_size)) - self._lost)
                self.on_failure(PeerFailure(self._gone_line(self._lost), self.rank == first_left))
            return


def place_line(rank: int, host: str, step: int, reason: str) -> str:
    """A reason with the rank that met it, its host and its last step."""
    return f"rank {rank} on {host}, after step {step}: {reason}"


def is_lost_exchange(error: BaseException) -> bool:
    """Whether an error says no more than that an exchange with a peer failed, which is then what is to be explained.

    NCCL's have types of their own; gloo's are RuntimeErrors, told by their words.
    """
    if isinstance(error, DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "by peer", "Broken pipe"))


def lost_exchange_line(error: BaseException) -> str:
    """What such an error says, in one line: without places in the library's source, and gloo's advice."""
    text = str(error)
    _, _, nccl = text.partition("Last error:")
    lines = (nccl.strip() or text).splitlines()
    said = re.sub(r"^.*[.]c(c|pp):[0-9]+[]]? ", "", lines[0] if lines else type(error).__name__)
    return f"an exchange with a peer failed ({said.partition('. This is')[0]})"


def gpu_failure_line(error: BaseException) -> str:
    """What CUDA says of a GPU that failed or is full, in one line without its advice; "" for an error of another kind.

    NCCL's errors say it too where the GPU failed earlier, and the exchange is the first to see it.
    """
    words = r"(CUDA error: .*|Cuda failure .*|CUDA out of memory(?:.*?is free[.]|.*))"
    found = re.search(words, str(error))
    return found[1] if found else ""


def _own_address() -> str:
    """Where this host's name leads, which is where gloo listens; '' if nowhere."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _text(said: bytes) -> str:
    """A value of the store, to which anyone can write anything. The store takes no more than some MB."""
    return said.decode(errors="replace")


def _place(said: bytes) -> tuple[str, str]:
    """Name and address of a host, as its rank has told them (`Heartbeat.start`)."""
    host, _, address = one_line(_text(said)).partition(" ")
    return host, address


def _ranks(said: bytes, world_size: int) -> frozenset[int]:
    """The ranks that are named in a list in JSON; none where it is no list."""
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return frozenset()
    named = found if isinstance(found, list) else []
    return frozenset(rank for rank in named if type(rank) is int and 0 <= rank < world_size)


def _ended(beat: str) -> bool:
    return beat in (_LEFT, _PARTED)


def _key(rank: int) -> str:
    return f"beat/{rank}"
