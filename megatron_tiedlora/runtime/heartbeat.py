"""Detect lost ranks. Every rank writes a heartbeat to the process group's store, so all ranks see which one stops.

If a host or its network fails, other ranks would wait until the time limit of the process group. A missing heartbeat
shows the failure within seconds. A thread of each rank sends heartbeats over a separate connection to torch's store of
the process group. This module does not open a port. The first rank that knows why the run fails writes the reason to
the store. So all ranks have the same reason, and only one rank shows it. The caller decides how a rank ends.

Only rank 0 reads keys of every rank, and publishes what it finds. So others read a few keys, whatever the world size.

torch's store does not authenticate its clients. So values that cannot be parsed are ignored and do not end a thread.
"""

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

from megatron_tiedlora.base.messages import one_line

SILENCE_SECONDS = 30.0
BEAT_SECONDS = 1.0
_MISSED_BEATS = 4  # after a failed message, a rank that misses this many heartbeats is lost
_LEFT, _FAILED = "left", "failed"  # the last heartbeat of a rank that finished, and of a rank that failed
_ENDED = (_LEFT, _FAILED)
_LOST, _REASON, _HOSTS = "lost", "reason", "hosts"  # keys of the store that rank 0 creates
_key = "beat/{}".format  # the key of a rank's heartbeat


@dataclass(frozen=True)
class PeerFailure:
    """The failure that ends a run.

    Attributes:
        reason: the reason as one line, with rank, host and last step.
        reports: whether this rank shows the reason, because it was the first rank that knew it.
    """

    reason: str
    reports: bool


def connect(*, limit: timedelta) -> Store:
    """Open a separate connection to the process group's store, and return it.

    Every launch of the ranks needs its own store. torchrun's restart count does not identify a launch. If an agent
    reconnects, the other agents restart their ranks without increasing the count, so hosts have different counts.
    """
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(master, port, is_master=False, timeout=limit, wait_for_workers=False)
    return PrefixStore("heartbeat", store)


@dataclass
class Heartbeat:
    """The heartbeat of one rank. Call `start` when the process group exists, and `leave` when the run has finished.

    Attributes:
        step: a function that returns the number of this rank's last finished step.
        on_failure: a function that is called once, in a thread, if another rank fails and this rank does not end.
        reports_for_host: a function that returns whether this rank shows the reason if the store is lost. It is called
            at most once.
        silence_seconds: the time without a heartbeat after which a rank is considered lost.
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
    _ends: bool = False  # whether the main thread knows that the run ends
    _unanswered: int = 0  # number of checks by `_watch` since the store last answered
    _lost: frozenset[int] = frozenset()
    _reason: str = ""
    _main_left: bool = False
    _main_gone: bool = False

    def start(self) -> "Heartbeat":
        """Exchange host names between ranks, start the heartbeat and return it. All ranks must call this."""
        if self.rank == 0:
            self.store.set(_LOST, "0")
            self.store.set(_REASON, "")
        self.store.set(_key(self.rank), "0")
        host = socket.gethostname()
        try:
            address = socket.gethostbyname(host)  # gloo listens on this address
        except OSError:
            address = ""
        self.store.set(f"host/{self.rank}", f"{host} {address}")  # last: rank 0 waits for it, and the others for rank 0
        if self.rank == 0:
            given = self.store.multi_get([f"host/{rank}" for rank in range(self.world_size)])
            self.store.set(_HOSTS, "\n".join(one_line(_text(each)) for each in given))
        found = [*_text(self.store.get(_HOSTS)).split("\n"), *[""] * self.world_size][: self.world_size]
        self._hosts, _, self._addresses = zip(*(one_line(each).partition(" ") for each in found), strict=True)
        self._threads = tuple(
            threading.Thread(target=target, name=f"heartbeat{target.__name__}", daemon=True)
            for target in (self._beat_on, self._watch)
        )
        for thread in self._threads:
            thread.start()
        return self

    @property
    def main_lost(self) -> bool:
        """Return whether rank 0 is lost. The store, which rank 0 may host, may then be lost too."""
        return self._main_gone or 0 in self._lost

    def with_names(self, text: str) -> str:
        """Return a library's message with each `[ADDRESS]` replaced by the ranks that use this address."""
        for address, host in dict(zip(self._addresses, self._hosts, strict=True)).items():
            there = [rank for rank, other in enumerate(self._addresses) if other == address]
            ranks = f"rank {there[0]}" if len(there) == 1 else f"one of ranks {', '.join(map(str, there))}"
            text = text.replace(f"[{address}]", f"[{ranks} on {host}]") if address else text
        return text

    def leave(self, *, limit: float = 10.0) -> None:
        """Stop the heartbeat of a rank that has finished, so that the other ranks do not consider it lost.

        The threads must end before the interpreter, because a thread inside a store call would abort the process.
        """
        self._over.set()
        for thread in self._threads:
            thread.join(limit)
        with suppress(RuntimeError):
            self.store.set(_key(self.rank), _LEFT)

    def leave_with_main(self) -> None:
        """Wait until rank 0 has stopped its heartbeat, without a time limit, and then stop this rank's heartbeat.

        All ranks of a finished run call this. Rank 0 may still write files, and launchers end the other ranks some time
        after the first rank has ended. Rank 0 then waits briefly until the heartbeats of all other ranks have stopped.

        Raises:
            DistNetworkError: the store and rank 0 are lost.
            DistError: the run failed or was stopped while this rank waited. The message is the reason.
        """
        pause = self.beat_seconds / 20
        try:
            while self.rank:
                main = _text(self.store.get(_key(0)))  # read before the reason, which a failing rank writes first
                if reason := self._line(self.store.get(_REASON)):
                    raise DistError(reason)
                if main == _LEFT:
                    break
                time.sleep(pause)
                pause = min(1.5 * pause, self.beat_seconds)
        except DistNetworkError:  # the values of the last heartbeat are still valid
            if self._reason:
                raise DistError(self._reason) from None
            if not self._main_left:
                raise
        self.leave()
        self.wait_for_others(beats=10)

    def wait_for_main(self, *, limit: float = 5.0) -> None:
        """Wait at most `limit` seconds for rank 0's last heartbeat, as launchers end all ranks once one has ended."""
        deadline = time.monotonic() + limit
        with suppress(RuntimeError):
            while self.rank and _text(self.store.get(_key(0))) != _LEFT and time.monotonic() < deadline:
                time.sleep(self.beat_seconds / 10)

    def failed(self, reason: str) -> PeerFailure:
        """Share the reason why this rank fails, and return the failure. An earlier shared reason takes precedence."""
        self._ends = True
        return self._share(rank_line(self.rank, self._host(self.rank), self.step(), reason))

    def explain(self, symptom: str) -> PeerFailure:
        """Find the reason why a message between ranks failed, share it with all ranks, and return the failure.

        This waits for a few heartbeats. The reason is the one that another rank shared, or the ranks whose heartbeats
        have stopped, by rank 0's checks. Without either, the reason is `symptom`.
        """
        self._ends = True
        here = rank_line(self.rank, self._host(self.rank), self.step(), symptom)
        silent, checks, last, changed = set[int](), list[int](), b"", 0  # the numbers of rank 0's checks
        try:
            for turn in range(3 * 4 * _MISSED_BEATS):
                lost, reason, main = self.store.multi_get([_LOST, _REASON, _key(0)])
                number, unchanged = self._told(lost)
                if self._line(reason):
                    break
                if main != last:
                    last, changed = main, turn
                if number not in (-1, *checks[-1:]):
                    checks.append(number)
                    passed = number - checks[0]  # since the first one, a rank that lives has changed its heartbeat
                    silent = {rank for rank, times in unchanged.items() if times >= passed}
                    if passed > _MISSED_BEATS or (passed > 1 and not silent):
                        break
                elif turn - changed > 4 * _MISSED_BEATS:  # rank 0 no longer checks
                    silent = {0} if self.rank and _text(main) not in _ENDED else set()
                    break
                time.sleep(self.beat_seconds / 4)
        except RuntimeError:
            # A rank in the symptom other than rank 0 was lost first, so it is the reason: launchers then ended rank 0.
            is_other = checks and re.search(r"\[(rank|one of ranks) [1-9]", symptom)
            return self._store_gone(here if is_other else "")
        self._main_gone = 0 in silent
        return self._share(self._gone_line(silent) if silent else here)

    def leave_failed(self) -> None:
        """Stop the heartbeat after a failure. Rank 0 then waits briefly, so that other ranks can read the reason."""
        with suppress(RuntimeError):
            self._over.set()
            self.store.set(_key(self.rank), _FAILED)
            self.wait_for_others()

    def wait_for_others(self, *, beats: int = 3) -> None:
        """Wait on rank 0 until all other ranks have stopped their heartbeats, because the store may end with rank 0."""
        deadline, left = time.monotonic() + beats * self.beat_seconds, {*range(1, self.world_size)}
        with suppress(RuntimeError):
            while self.rank == 0 and left and time.monotonic() < deadline:
                left = {rank for rank, beat in self._beats(left).items() if beat not in _ENDED} - self._lost
                time.sleep(self.beat_seconds / 10 if left else 0)

    def _share(self, line: str) -> PeerFailure:
        """Share `line` as the reason and return the failure, whose reason is another rank's if it was shared first."""
        line = one_line(line)
        mine = f"{self.rank} {line}"
        try:
            stored = self.store.compare_set(_REASON, "", mine)
            if not self._line(stored):  # not written by a rank
                stored = self.store.compare_set(_REASON, stored, mine)  # type: ignore[arg-type]  # takes bytes too
        except RuntimeError:  # the store and rank 0 are gone
            self._main_gone = True
            return PeerFailure(self._reason, False) if self._reason else PeerFailure(line, self.reports_for_host())
        return PeerFailure(self._line(stored) or line, stored == mine.encode())

    def _line(self, value: bytes) -> str:
        """Return the reason in a value that `_share` has stored, or "" if there is none."""
        rank, _, line = _text(value).partition(" ")
        return one_line(line) if rank in map(str, range(self.world_size)) else ""

    def _host(self, rank: int) -> str:
        return self._hosts[rank] if self._hosts else socket.gethostname()

    def _beats(self, ranks: Collection[int]) -> dict[int, str]:
        """Return the last heartbeats of ranks."""
        return dict(zip(ranks, map(_text, self.store.multi_get([*map(_key, ranks)])), strict=True))

    def _told(self, value: bytes) -> tuple[int, dict[int, int]]:
        """Return what rank 0 has published under _LOST: the number of its last check, or -1 if the value cannot be
        parsed, and `_unchanged` of the other ranks."""
        try:
            number, *words = map(int, re.split("[ :]", _text(value)))
            found = dict(zip(words[::2], words[1::2], strict=True))
        except ValueError:
            return -1, {}
        return number, {rank: found[rank] for rank in found.keys() & range(self.world_size) if rank != self.rank}

    def _gone_line(self, ranks: Collection[int]) -> str:
        named = ", ".join(f"rank {rank} on {self._host(rank)}" for rank in sorted(ranks)[:8])
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        why = "killed, out of memory, or the host or its link is down"
        return f"{named}{more} stopped responding after step {self.step()} ({why})"

    def _store_gone(self, line: str = "") -> PeerFailure:
        """Return the failure if the store is lost. The reason is the shared one, or `line`, or that rank 0 is lost."""
        self._main_gone = True
        if self._reason:
            return PeerFailure(self._reason, False)
        line = line or f"{self._gone_line([0])}, as seen by rank {self.rank} on {self._host(self.rank)}"
        return PeerFailure(one_line(line), self.reports_for_host())

    # In threads -------------------------------------------------------------------------------------------------

    def _beat_on(self) -> None:
        """Send heartbeats. Rank 0 checks all ranks and publishes the result. Other ranks read it, and check rank 0."""
        count, heard = 0, dict.fromkeys(range(self.world_size), ("", 0))
        while not self._over.wait(self.beat_seconds):
            count += 1
            try:
                self.store.set(_key(self.rank), str(count))
                if self.rank == 0:
                    unchanged = self._unchanged(heard, self._beats(heard))
                    self.store.set(_LOST, " ".join([str(count), *(f"{rank}:{n}" for rank, n in unchanged.items())]))
                lost, reason, main = self.store.multi_get([_LOST, _REASON, _key(0)])
                if self.rank:
                    unchanged = self._told(lost)[1] | self._unchanged(heard, {0: _text(main)})
                self._lost = frozenset(rank for rank, times in unchanged.items() if times > self._patience)
                self._unanswered = 0
                self._main_left, self._reason = _text(main) == _LEFT, self._line(reason)
            except RuntimeError:  # the store did not answer, which `_watch` counts
                continue

    @property
    def _patience(self) -> int:
        """Return the number of heartbeats that another rank may miss. Time is measured in this rank's own heartbeats,
        so a process that was suspended does not count heartbeats as missing when it resumes."""
        return math.ceil(self.silence_seconds / self.beat_seconds)

    def _unchanged(self, heard: dict[int, tuple[str, int]], beats: Mapping[int, str]) -> dict[int, int]:
        """Return how many times in a row other ranks' heartbeats were the same, if more than once, by rank. Update
        `heard` with the new heartbeats. Ranks that have ended are left out."""
        for rank, beat in beats.items():
            before, times = heard[rank]
            heard[rank] = (beat, times + 1 if beat == before else 1)
        return {r: heard[r][1] for r in beats if r != self.rank and beats[r] not in _ENDED and heard[r][1] > 1}

    def _watch(self) -> None:
        """Call `on_failure` if another rank fails and this rank's main thread does not end."""
        failing = 0
        while not self._over.wait(self.beat_seconds) and not self._main_left:
            self._unanswered += 1
            failing += bool(self._reason)
            no_answer = self._unanswered > self._patience
            if not (no_answer or self._lost or failing > self._patience):
                continue
            if self._ends and self._over.wait(self.silence_seconds):
                return
            # Do not use the store here: without a network connection the call would not return.
            if self._reason or no_answer:
                self.on_failure(self._store_gone())
            else:
                first_left = min(set(range(self.world_size)) - self._lost)
                self.on_failure(PeerFailure(self._gone_line(self._lost), self.rank == first_left))
            return


def rank_line(rank: int, host: str, step: int, reason: str) -> str:
    """Return one line with the rank that reports a reason, its host, its last step and the reason."""
    return f"rank {rank} on {host}, after step {step}: {reason}"


def is_lost_exchange(error: BaseException) -> bool:
    """Return whether an error only reports that communication between ranks failed. `explain` then finds the reason.

    NCCL's errors have their own types. gloo's errors are RuntimeErrors and are recognised by their text.
    """
    if isinstance(error, DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "NCCL", "by peer", "Broken pipe"))


def lost_exchange_line(error: BaseException) -> str:
    """Return a communication error as one line, without source locations and gloo's advice."""
    text = str(error)
    _, _, nccl = text.partition("Last error:")
    lines = (nccl.strip() or text).splitlines()
    said = re.sub(r"^.*[.]c(c|pp):[0-9]+[]]? ", "", lines[0] if lines else type(error).__name__)
    return f"an exchange with a peer failed ({said.partition('. This is')[0]})"


def gpu_failure_line(error: BaseException) -> str:
    """Return CUDA's message about a failed or full GPU as one line without its advice, or "" for other errors.

    An error of NCCL also contains this message if the GPU failed earlier and NCCL detects the failure first.
    """
    words = r"(CUDA error: .*|Cuda failure .*|CUDA out of memory(?:.*?is free[.]|.*))"
    found = re.search(words, str(error))
    return found[1] if found else ""


def _text(value: bytes) -> str:
    """Return a value of the store as text. The value may be invalid UTF-8, because any client can write it."""
    return value.decode(errors="replace")
