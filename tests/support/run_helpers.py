"""Runs launch/train.py (or another script) on a tiny model: as forked ranks, as a plain command, under a launcher.

Every start has a time limit, and a hang is a failure. `start_ranks` forks its ranks off a server that has imported
torch, DeepSpeed and transformers already (seconds for each start otherwise); a rank is still a process of its own, in
which launch/train.py runs as `__main__` with its own environment, signals and exit status. A prelude is a function that
runs in a rank before the script; see run_preludes.py.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from support.folders import ROOT, SUPPORT
from support.ranks import (
    ENVIRONMENT,
    LAUNCHER_VARIABLES,
    TIME_LIMIT,
    changed_environment,
    fork_server,
    free_port,
    redirect_output,
)

if TYPE_CHECKING:
    from megatron_tiedlora.config.settings import Settings

TRAIN = ROOT / "launch" / "train.py"
EVALUATE = ROOT / "launch" / "evaluate.py"
PRELUDES = SUPPORT / "run_preludes.py"

Prelude = Callable[[], None]


# Four adapters that differ in what can differ, by the settings of each.
FOUR: dict[str, dict[str, Any]] = {
    "a": {"method": "tl6", "rank": 8, "max_steps": 6},
    "b": {"method": "lora", "layers": [2, 3], "global_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2},
    "c": {"method": "vera", "rank": 16, "targets": "all", "seed": 3, "max_steps": 6, "save_interval": 3},
    "d": {"method": "tl2", "rank": 1, "targets": "o_proj,gate_up", "gradient_clipping": 0.01, "max_steps": 6},
}


# A tiny model and data ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A tiny model with data, and the cache that runs on it share."""

    folder: Path
    model: Path
    train: Path
    validation: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Settings of a short fp32 run with sizes that 2 does not divide, paths as texts; None takes a setting out."""
        settings = {
            "model": self.model,
            "train_file": self.train,
            "validation_file": self.validation,
            "dtype": "fp32",
            "rank": 3,
            "seed": 5,
            "max_length": 96,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 10,
            "warmup_steps": 2,
            "learning_rate": 2e-2,
            "eval_interval": 2,
            **changes,
        }
        found = {name: value for name, value in settings.items() if value is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}

    def arguments(self, **changes: Any) -> list[str]:
        """`settings` as flags."""
        return [f"--{name}={_flag_text(value)}" for name, value in self.settings(**changes).items()]


def _flag_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def write_base(folder: Path, **shape: Any) -> Base:
    """Write a tiny model (3 layers unless `shape` says otherwise) and two data files."""
    from support.tiny_models import write_tiny_model

    return Base(
        folder,
        write_tiny_model(folder / "model", **shape),
        write_rows(folder / "train.jsonl", 24, seed=1),
        write_rows(folder / "validation.jsonl", 6, seed=2),
    )


def write_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """Prompt and completion rows; the answers' lengths differ a lot."""
    draw = random.Random(seed)
    rows = [
        {
            "prompt": "".join(draw.choice("abcdef ") for _ in range(draw.randint(3, 30))) + "?",
            "completion": "".join(draw.choice("xyz") for _ in range((1, 4, 11, 40)[index % 4])),
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_adapters(file: Path, own: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a file of --adapters, from the settings of each adapter by its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump([{"name": name, **settings} for name, settings in own.items()], sort_keys=False))
    return file


# Ranks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a start ended: exit status by rank (or of the one command; minus the signal that killed it) and outputs."""

    statuses: list[int]
    outputs: list[str]
    errors: list[str]

    @property
    def status(self) -> int:
        """The one exit status of all ranks."""
        assert len(set(self.statuses)) == 1, f"{self.statuses}\n{self.tail()}"
        return self.statuses[0]

    def tail(self) -> str:
        """The end of everything printed."""
        return "\n".join(f"--- rank {i}\n{o[-2000:]}\n{e[-3000:]}" for i, (o, e) in enumerate(zip_outputs(self)))

    def expect(self, wanted: int) -> Ended:
        """Fail with the output unless every rank ended with status `wanted`."""
        assert self.statuses == [wanted] * len(self.statuses), f"ended with {self.statuses}\n{self.tail()}"
        return self

    def error_line(self) -> str:
        """The one `error: ...` line of all that was printed, which must hold no traceback."""
        lines = "\n".join(part for pair in zip_outputs(self) for part in pair).splitlines()
        found = [line for line in lines if line.startswith("error: ")]
        assert len(found) == 1 and not any(line.startswith("Traceback") for line in lines), self.tail()
        return found[0]


def zip_outputs(ended: Ended) -> list[tuple[str, str]]:
    """(stdout, stderr) by rank."""
    return list(zip(ended.outputs, ended.errors, strict=True))


def _without_gloo(printed: str) -> str:
    """Without the lines that gloo prints with torch 2.10."""
    return "".join(line for line in printed.splitlines(keepends=True) if not line.startswith("[Gloo] Rank "))


@dataclass
class World:
    """Ranks that run."""

    processes: list[Any]
    files: list[tuple[Path, Path]]
    _deadline: float = field(default_factory=lambda: time.monotonic() + TIME_LIMIT)

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, number)

    def wait(self) -> Ended:
        """Wait for all ranks; a hang fails."""
        try:
            for process in self.processes:
                process.join(max(0.0, self._deadline - time.monotonic()))
            hung = [process.exitcode is None for process in self.processes]
        finally:
            self.kill()
        ended = Ended(
            [process.exitcode for process in self.processes],
            [_without_gloo(out.read_text(errors="replace")) for out, _ in self.files],
            [err.read_text(errors="replace") for _, err in self.files],
        )
        assert not any(hung), f"a hang: {hung}\n{ended.tail()}"
        return ended

    def kill(self) -> None:
        """SIGKILL to what is left, with whatever it started."""
        for process in self.processes:
            if process.exitcode is None:
                for kill in (os.killpg, os.kill):  # the group exists once the rank has made it
                    with suppress(ProcessLookupError):
                        kill(process.pid, signal.SIGKILL)
                process.join(10)


def start_ranks(
    arguments: Sequence[str],
    *,
    folder: Path,
    cache: Path | None = None,
    ranks: int | None = None,
    prelude: Prelude | None = None,
    environment: dict[str, str] | None = None,
    script: Path = TRAIN,
) -> World:
    """Start `script` with `arguments` in `folder`.

    Args:
        ranks: started as a launcher would, with RANK and so on; None is plain python without any of them.
        prelude: a function that can be pickled; runs in every rank before the script.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**ENVIRONMENT, **(environment or {})}
    environment["MEGATRON_TIEDLORA_CACHE"] = str(cache or folder / "cache")
    if ranks is not None:
        port = str(free_port())
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = len(list(folder.glob("*.rank*.out")))
    processes, files = [], []
    for rank in range(ranks or 1):
        if ranks is not None:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        out, err = (folder / f"{start}.rank{rank}.{kind}" for kind in ("out", "err"))
        out.touch()  # its number is taken
        rank_arguments = ([str(script), *arguments], environment.copy(), str(folder), str(out), str(err), prelude)
        process = fork_server().Process(target=_be_rank, args=rank_arguments, daemon=True)
        process.start()
        processes.append(process)
        files.append((out, err))
    return World(processes, files)


def run_ranks(arguments: Sequence[str], **keywords: Any) -> Ended:
    """`start_ranks` and wait."""
    return start_ranks(arguments, **keywords).wait()


def run_code(code: str, folder: Path, *arguments: object) -> Ended:
    """Run a script in a process of its own, which has imported the package."""
    script = folder / "script.py"
    script.write_text(code)
    return run_ranks([str(argument) for argument in arguments], folder=folder / "work", script=script)


def start_run(
    base: Base, folder: Path, /, *, ranks: int | None = None, prelude: Prelude | None = None, **changes: Any
) -> World:
    """A start with run folder `folder`; where `adapters` are given as settings by name, their file lies beside it."""
    if isinstance(own := changes.get("adapters"), Mapping):
        changes["adapters"] = write_adapters(folder.parent / "adapters.yaml", own)
    arguments = base.arguments(**{"output_dir": folder, **changes})
    work = folder.parent / f"{folder.name}-work"
    return start_ranks(arguments, folder=work, cache=base.cache, ranks=ranks, prelude=prelude)


def run(base: Base, folder: Path, /, *, expect: int | None = 0, **changes: Any) -> Ended:
    """`start_run` to its end, with status `expect` on every rank, unless that is None."""
    ended = start_run(base, folder, **changes).wait()
    return ended if expect is None else ended.expect(expect)


def begin(given: Settings | Sequence[str]) -> None:
    """The start of a run of one rank in this process, as far as it writes nothing: the calls of training/run.py,
    without a process group, until weights would be loaded. Then it gives all back.

    A start that is refused ends here with its UserError, a second before a rank would.
    """
    from megatron_tiedlora.config.cli import parse_settings
    from megatron_tiedlora.config.settings import Settings
    from megatron_tiedlora.planning.adapter_plans import plan_and_read
    from megatron_tiedlora.training.build import checked_starts
    from megatron_tiedlora.training.start import open_run

    settings = given if isinstance(given, Settings) else parse_settings(list(given), Settings)
    plans, data = plan_and_read(settings, rank=0, world_size=1)
    with changed_environment({"RANK": "0", "WORLD_SIZE": "1"}), ExitStack() as held:
        end: Any = SimpleNamespace(held=held, owners=[])
        start = open_run(settings, plans, data, end)
        if start.left:
            with checked_starts(start.left, start.checkpoints):
                pass


def _be_rank(
    command: list[str], environment: dict[str, str], folder: str, out: str, err: str, prelude: Prelude | None
) -> None:
    os.setsid()
    redirect_output(Path(out), Path(err))
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    if prelude is not None:
        prelude()
    runpy.run_path(command[0], run_name="__main__")


# Real commands --------------------------------------------------------------------------------------------------


@dataclass
class Command:
    """A command that runs in a session of its own."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    deadline: float  # of the monotonic clock

    def wait(self) -> Ended:
        """Wait for the command itself; a hang fails."""
        try:
            self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"a hang\n{self.ended().tail()}") from None
        return self.ended()

    def ended(self) -> Ended:
        """What is known of it so far."""
        texts = [path.read_text(errors="replace") for path in (self.out, self.err)]
        return Ended([self.process.returncode], texts[:1], texts[1:])

    def descendants(self) -> list[psutil.Process]:
        """All processes that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_gone(self, processes: list[psutil.Process]) -> None:
        """Wait for processes that the command has left behind; one that stays is a failure."""
        _, alive = psutil.wait_procs(processes, timeout=max(0.0, self.deadline - time.monotonic()))
        left = [process.cmdline() for process in alive]
        self.kill()
        assert not left, f"still running: {left}\n{self.ended().tail()}"

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def start_command(
    command: Sequence[str], *, folder: Path, cache: Path | None = None, limit: float = TIME_LIMIT
) -> Command:
    """Start a command in `folder`, with the environment of a test and `limit` seconds of time."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment |= {**ENVIRONMENT, "MEGATRON_TIEDLORA_CACHE": str(cache or folder / "cache")}
    out, err = folder / "command.out", folder / "command.err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            list(command), cwd=folder, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
    return Command(process, out, err, time.monotonic() + limit)


def plain_command(arguments: Sequence[str]) -> list[str]:
    """python launch/train.py ARGUMENTS."""
    return [sys.executable, str(TRAIN), *arguments]


def deepspeed_command(arguments: Sequence[str], *, ranks: int, prelude: str | None = None) -> list[str]:
    """deepspeed --num_gpus RANKS launch/train.py ARGUMENTS, behind a prelude of run_preludes.py."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), *_script(prelude), *arguments]


def torchrun_command(
    arguments: Sequence[str], *, ranks: int, options: Sequence[str] = (), prelude: str | None = None
) -> list[str]:
    """torchrun --nproc_per_node RANKS OPTIONS launch/train.py ARGUMENTS; without options on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launcher, *(options or ["--master_port", str(free_port())]), *_script(prelude), *arguments]


def _script(prelude: str | None) -> list[str]:
    return [str(TRAIN)] if prelude is None else [str(PRELUDES), f"--prelude={prelude}"]
