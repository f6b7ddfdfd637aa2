"""Starts launch/sweep.py's work in a process of its own whose runs are forked, not launched: seconds less for each.

The sweep's process comes from the server of run_helpers, which has imported everything; it forks launch/train.py and
launch/evaluate.py as one rank each. They are its children, and inherit its lock, as launched commands do. Folders of
studies are also written here as those commands leave them, without training anything.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_tiedlora.adapters.tied_adapter import Target, make_adapter_config
from megatron_tiedlora.cluster.launchers import Job
from megatron_tiedlora.cluster.start import make_job
from megatron_tiedlora.config.job_settings import parse_launcher, parse_sweep
from megatron_tiedlora.study import tables
from megatron_tiedlora.study.plan import SweepPlan, plan_sweep
from megatron_tiedlora.study.record import Point, Study, make_grid
from megatron_tiedlora.study.sweep import sweep
from support.folders import ROOT
from support.ranks import ENVIRONMENT, fork_server, redirect_output
from support.run_helpers import Base, Ended, World, _be_rank, write_base
from support.run_preludes import at_call, kill_at_call, poison, slow_steps

SHAPES: Mapping[str, tuple[int, int]] = {"llama2-7b": (32, 4096), "gpt-2b-001": (24, 2048)}  # layers L, hidden size d
SCORED = {"squad": "squad", "gsm8k": "gsm8k", "hellaswag": "accuracy", "dialogsum": "rougeL", "iwslt2017": "bleu"}


def no_start(*_: Any) -> Any:
    """In the place of `begin_job` where a sweep starts nothing."""
    raise AssertionError("nothing is to be started")


def write_study(
    folder: Path, *, task: str = "squad", model: str = "llama2-7b", known: bool = True, **settings: Any
) -> Path:
    """A study without runs. `known`: its base is the paper's `model`, by which name its shape goes."""
    folder.mkdir(parents=True)
    content = {"methods": ["lora", "tl6"], "ranks": [2, 8], "learning_rates": [1e-4], "model": model, "task": task}
    content |= settings
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    layers, hidden = SHAPES[model]
    command = parse_sweep([f"--config={folder / 'sweep.yaml'}", f"--output_dir={folder}"])
    target = Target("qkv", hidden, (hidden,) * 3, "column")

    def num_trained(point: Point) -> int:
        adapted = tuple(range(1, layers + 1)) if point.layer is None else (point.layer,)
        config = make_adapter_config(point.method, rank=point.rank, layers=adapted, targets=(target,), seed=0)
        return sum(config.num_trained().values())

    base = {
        "model": f"models/{model}",
        "base_hash": "0" * 64,
        "num_layers": layers,
        "trained": {point.name: num_trained(point) for point in make_grid(command, layers).points},
        "paper_model": model if known else None,
        "task": task,
        "metric": SCORED[task],
        "file_sha256": {},
    }
    (folder / "base.json").write_text(json.dumps(base))
    return folder


def write_run(
    folder: Path, name: str, *, state: str | None = "finished", best: float | None = 1.0, reason: str = "max_steps"
) -> Path:
    """The run folder of run `name`; `state` None is one that was killed."""
    run = folder / "runs" / name
    last = run / "checkpoints" / "step_10"
    last.mkdir(parents=True)
    (run / "run.yaml").write_text("seed: 1\n")
    (run / "checkpoints" / "latest").write_text("step_10\n")
    (last / "trainer_state.json").write_text(json.dumps({"step": 10, "best_metric": best}))
    if state is not None:
        (run / "run_status.json").write_text(json.dumps({"state": state, "step": 10, "reason": reason}))
    return run


def write_score(
    folder: Path, name: str, score: float, *, interval: Sequence[float] | None = None, samples: int = 500
) -> Path:
    """The score of the adapter of run `name`, or of `base`; its interval is 1 per cent to each side if not given."""
    scores = folder / "scores" / name
    scores.mkdir(parents=True)
    low, high = interval or (score - 1, score + 1)
    content = {"score": score, "n": samples, "confidence_interval": [low, high], "metric": "anything"}
    (scores / "results.json").write_text(json.dumps(content))
    return scores


def write_answers(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], score: float) -> None:
    """A finished run, its score, and the rows of its predictions.jsonl, which get a prompt and a reference."""
    write_run(folder, name)
    scores = write_score(folder, name, score, samples=len(rows))
    full = [{"prompt": f"p{index}", "prediction": "", "references": ["x"], **row} for index, row in enumerate(rows)]
    (scores / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in full))


def table2_markdown(studies: Sequence[Study]) -> str:
    """table2.md."""
    return tables.table2_layout(studies).markdown()


def table3_markdown(studies: Sequence[Study]) -> str:
    """table3.md."""
    return tables.table3_layout(studies).markdown()


def write_scored(folder: Path, name: str, score: float, **keywords: Any) -> None:
    """A finished run and its score."""
    write_run(folder, name)
    write_score(folder, name, score, **keywords)


LAUNCH = ROOT / "launch"
Given = tuple[Base, Path]  # a model with its data, and a test set
Preludes = Mapping[str, Callable[..., None]]  # by name of the start's log


def write_study_base(folder: Path) -> Given:
    """A tiny model, data whose answer depends on the question's last letter, and a test set: adapters of different
    methods, ranks and learning rates come to different scores on it."""
    base, test = write_base(folder), folder / "test.jsonl"
    for path, count, seed in ((base.train, 24, 1), (base.validation, 8, 2), (test, 24, 3)):
        draw = random.Random(seed)
        rows = [{"prompt": "".join(draw.choice("abcdef") for _ in range(9)) + ":"} for _ in range(count)]
        lines = [{**row, "completion": "zzx"[ord(row["prompt"][-2]) % 3]} for row in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return base, test


def study_arguments(base: Base, test: Path, folder: Path, **changes: Any) -> list[str]:
    """Flags of a sweep of 2 methods x 2 ranks x 2 learning rates, 16 steps each."""
    settings: dict[str, Any] = {
        "output_dir": folder,
        "methods": "lora,tl6",
        "ranks": "2,3",
        "learning_rates": "2e-1,5e-2",
        "test_file": test,
        "max_new_tokens": 3,
        "max_steps": 16,
        "eval_interval": 4,
        "rank": None,
        "learning_rate": None,
        **changes,
    }
    return base.arguments(**settings)


def planned(study: Given, folder: Path, *flags: str, **changes: Any) -> SweepPlan:
    """The plan of a sweep with these arguments."""
    return plan_sweep(parse_sweep([*study_arguments(*study, folder, **changes), *flags]))


def sweep_here(arguments: Sequence[str], begin: Any = no_start) -> int:
    """A sweep in this process; returns its exit status."""
    return sweep(parse_sweep(arguments), scripts=LAUNCH, begin=begin)


def a_job(folder: Path, *words: str, python: Path = Path(sys.executable), port: int = 1) -> Job:
    """A job of launch/train.py on this machine, whose files are written to `folder`."""
    settings = parse_launcher(["--num_gpus=1", "--master_port", str(port)])
    job = replace(make_job(settings, {}), program=(str(LAUNCH / "train.py"),), arguments=words, private=folder)
    return replace(job, python=str(python), gpus=())


@dataclass
class ForkedChild:
    """One forked rank, as a child of the sweep: what `wait_for_end` asks of a launcher that was started."""

    pid: int
    job: Any
    log: Path
    out: Path
    returncode: int | None = None

    @property
    def process(self) -> ForkedChild:
        """The launcher itself."""
        return self

    def poll(self) -> int | None:
        """Its exit status once it is gone; what it printed is in its log then."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                self.log.parent.mkdir(exist_ok=True)
                with self.log.open("a") as log:
                    printed = (path.read_text() for path in (self.out, self.out.with_suffix(".err")))
                    log.write(f"$ {Path(self.job.program[-1]).name}\n{''.join(printed)}")
        return self.returncode

    def here(self) -> list[Any]:
        """What it has left on this machine: nothing."""
        return []

    def end(self, say: Callable[[str], None]) -> None:
        """There is nothing to end."""

    def stop(self, number: int) -> None:
        """A signal to the rank, once."""
        if not self.told:
            os.kill(self.pid, number)
        self.told = True

    told = False

    def kill(self) -> None:
        """SIGKILL to the rank."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def forked_start(job: Any, log: Path, lock: int, *, work: Path, cache: Path, preludes: Preludes) -> ForkedChild:
    """Start a job of a sweep as one rank, and note the name of its log in work/starts."""
    name = log.stem
    with (work / "starts").open("a") as starts:
        starts.write(f"{name}\n")
    out = work / f"{len((work / 'starts').read_text().splitlines())}.out"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            prelude = functools.partial(preludes[name], os.getppid()) if name in preludes else None
            environment = {**ENVIRONMENT, "MEGATRON_TIEDLORA_CACHE": str(cache), **job.variables}
            words, err = [*job.program, *job.arguments], str(out.with_suffix(".err"))
            _be_rank(words, environment, str(work), str(out), err, prelude)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return ForkedChild(pid, job, log, out)


def _be_sweep(arguments: list[str], work: str, cache: str, preludes: Preludes, out: str, err: str) -> None:
    os.setsid()
    redirect_output(Path(out), Path(err))
    os.environ.update(ENVIRONMENT)
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a thread would not outlive the forks, and its lock might
    from megatron_tiedlora.config.cli import run_command

    start: Any = functools.partial(forked_start, work=Path(work), cache=Path(cache), preludes=preludes)
    run_command(lambda argv: sweep(parse_sweep(argv), scripts=LAUNCH, begin=start), arguments)


def start_sweep(arguments: list[str], *, work: Path, cache: Path, preludes: Preludes | None = None) -> World:
    """Start a sweep whose commands run in folder `work`; `preludes` run in them first, with the sweep's pid."""
    work.mkdir(parents=True, exist_ok=True)
    count = len(list(work.glob("sweep*.out")))
    out, err = work / f"sweep{count}.out", work / f"sweep{count}.err"
    keywords = (arguments, str(work), str(cache), preludes or {}, str(out), str(err))
    process = fork_server().Process(target=_be_sweep, args=keywords)
    process.start()
    return World([process], [(out, err)])


def run_sweep(arguments: list[str], **keywords: Any) -> Ended:
    """`start_sweep` and wait."""
    return start_sweep(arguments, **keywords).wait()


def work(folder: Path) -> Path:
    """Where the commands of a study run."""
    return folder.parent / f"{folder.name}-work"


def go_on(study: Given, folder: Path, *words: str, expect: int = 0, preludes: Preludes | None = None) -> Ended:
    """A sweep with only its folder and `words`, which must end with status `expect`."""
    keywords = {"work": work(folder), "cache": study[0].cache, "preludes": preludes}
    return run_sweep([f"--output_dir={folder}", *words], **keywords).expect(expect)


def run_study(study: Given, folder: Path, *, expect: int = 0, preludes: Any = None, **changes: Any) -> Ended:
    """A sweep with all its arguments."""
    words = study_arguments(*study, folder, output_dir=None, **changes)
    return go_on(study, folder, *words, expect=expect, preludes=preludes)


def starts(work: Path) -> list[str]:
    """What was started since the last call, in order."""
    file = work / "starts"
    if not file.is_file():
        return []
    names = file.read_text().splitlines()
    file.rename(work / f"starts.{len(list(work.glob('starts.*')))}")
    return names


# Preludes; the first argument is the sweep's pid ------------------------------------------------------------------


def kill_all_at_call(sweep: int, *, module: str, name: str, call: int = 1) -> None:
    """SIGKILL to the sweep and to this rank when `module.name` is called for the `call`-th time."""
    kill_at_call(module, name, call=call)
    at_call(module, name, lambda: os.kill(sweep, signal.SIGKILL), call=call)  # what is put in last comes first


def kill_all_at_step(sweep: int, *, step: int) -> None:
    """SIGKILL to the sweep and to this rank at the start of training step `step`."""
    kill_all_at_call(sweep, module="megatron_tiedlora.training.loop", name="Trainer._train_step", call=step)


def signal_sweep_at_step(sweep: int, *, step: int, number: int) -> None:
    """A signal to the sweep at the start of training step `step`; every step takes 0.3 s longer."""
    slow_steps()
    at_call("megatron_tiedlora.training.loop", "Trainer._train_step", lambda: os.kill(sweep, number), call=step)


def lose_the_loss(_sweep: int) -> None:
    """The loss is nan at step 2."""
    poison(2, "loss")
