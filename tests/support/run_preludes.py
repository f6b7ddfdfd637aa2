"""Functions that run in a rank before launch/train.py, to slow it down or to end it at a given point.

As a script it is launch/train.py behind one of them: `run_preludes.py --prelude=slow_steps ARGUMENTS`.
"""

from __future__ import annotations

import functools
import importlib
import os
import posix
import resource
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # `folders` is not on the path of a rank on another host
TRAIN = ROOT / "launch" / "train.py"


def slow_steps(seconds: float = 0.3, *, after: int = 0) -> None:
    """Every training step after step `after` takes so many seconds longer, so that a signal comes between two."""

    def sleep(trainer: Any, *_: Any) -> None:
        if trainer.last_step >= after:
            time.sleep(seconds)

    before_call("megatron_tiedlora.training.loop", "Trainer._train_step", sleep)


def late_rank_0(seconds: float = 60.0) -> None:
    """Rank 0 plans its run so much later than the others, so that one of them is the first to find what is wrong."""
    quick_start()
    late = seconds if os.environ["RANK"] == "0" else 3.0  # by then rank 0 handles signals
    before_call("megatron_tiedlora.planning.run_plan", "plan_run", lambda *_: time.sleep(late))


def quick_start() -> None:
    """Nothing is compiled, and what compiles is not imported, which costs a third of a rank's start.

    DeepSpeed's Muon asks for it as it is imported, and torch.optim as it makes its first optimizer.
    """
    import torch

    def as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
        return function if function is not None else as_it_is

    torch.compile = as_it_is
    if "torch._dynamo" not in sys.modules:
        dynamo: Any = ModuleType("torch._dynamo")  # an attribute that it lacks ends the rank
        dynamo.disable, dynamo.graph_break = as_it_is, lambda: None
        dynamo.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)
        dynamo.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # transformers 5.5 imports a module of it
        sys.modules["torch._dynamo"] = torch._dynamo = dynamo


def bare_start() -> None:
    """A quick start of a run whose figures of speed and plot nobody looks at: neither is made."""
    quick_start()
    import transformers

    if "transformers.models" not in sys.modules:  # as it is imported it reads a thousand files, to list their classes
        models: Any = ModuleType("transformers.models")
        models.__path__ = [str(Path(transformers.__file__).parent / "models")]
        sys.modules["transformers.models"] = transformers.models = models
    from megatron_tiedlora.training import finish, throughput

    throughput.measured_peak = lambda *_: 1e12
    throughput.step_flops = token_flops
    finish.plot_losses = lambda *_, **__: None


def token_flops(_shape: Any, _adapter: Any, lengths: Sequence[int], *_: int) -> Counter[str]:
    """In the place of the FLOPs of a step, for which the model is traced: a quarter of a short run's time."""
    return Counter(linears=sum(lengths))


def whole_run() -> None:
    """A forked rank counts FLOPs, draws the losses and syncs files, as the command does; preloaded.py replaces that."""
    from megatron_tiedlora.planning.passes import step_flops
    from megatron_tiedlora.runtime.run_folder import plot_losses
    from megatron_tiedlora.training import finish, throughput

    finish.plot_losses, throughput.step_flops = plot_losses, step_flops
    os.fsync = posix.fsync


def long_steps() -> None:
    """`slow_steps` after a bare start."""
    bare_start()
    slow_steps()


def watched_steps() -> None:
    """`long_steps`, and a rank that is silent for 5 s counts as lost."""
    long_steps()
    short_silence(5.0)


def unhurried_steps() -> None:
    """`watched_steps` that last over a second from step 4 on: on a busy machine too, ranks that train on after a
    fault notice it before their end."""
    watched_steps()
    slow_steps(1.0, after=3)


def short_silence(seconds: float) -> None:
    """A rank that is silent for so long counts as lost."""

    import megatron_tiedlora.runtime.ending

    megatron_tiedlora.runtime.ending.SILENCE_SECONDS = seconds


def kill_at_step(step: int, number: int = signal.SIGTERM, *, rank: int | None = None) -> None:
    """The rank (or each) sends itself a signal at the start of training step `step`, which is the last one then."""

    def look(trainer: Any, *_: Any) -> None:
        if trainer.last_step + 1 == step and rank in (None, trainer.rank):
            os.kill(os.getpid(), number)

    before_call("megatron_tiedlora.training.loop", "Trainer._train_step", look)


def kill_once() -> None:
    """Rank 1 is killed at step 5 of the first start; the file that KILL_ONCE names tells the next ones of it.

    Every start is a bare one.
    """
    bare_start()
    done = Path(os.environ["KILL_ONCE"])
    if os.environ["RANK"] == "1" and not done.exists():
        kill_at_step(5, signal.SIGKILL)
        before_call("megatron_tiedlora.training.loop", "Trainer._train_step", lambda *_: done.touch())


def no_compiler(rank: int, *, pays: bool = False) -> None:
    """Compiling fails on this rank, and takes no time on the others. `pays`: every run is long enough for it."""
    from megatron_tiedlora.parallel.kernels import Kernels
    from megatron_tiedlora.planning import run_plan as plan

    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler\nwith a long story")

    if pays:
        plan.pays_to_compile = lambda *_, **__: True
    found = Kernels(normalise=broken) if int(os.environ["RANK"]) == rank else Kernels()
    Kernels.compiled = lambda self, **_: found  # type: ignore[method-assign]


def without_compiler() -> None:
    """A rank that has imported torch's compiler by its last step ends with a traceback."""

    def look(*_: Any) -> None:
        assert "torch._inductor.compile_fx" not in sys.modules

    before_call("megatron_tiedlora.training.finish", "export", look)


def kill_at_call(module: str, name: str, *, call: int = 1, number: int = signal.SIGKILL) -> None:
    """The rank sends itself a signal when `module.name` is called for the `call`-th time, before it does anything."""
    at_call(module, name, lambda: os.kill(os.getpid(), number), call=call)


def kill_rank_at_call(rank: int, module: str, name: str, mark: Path, *, call: int) -> None:
    """SIGKILL of one rank at a call of `module.name`, at the time that `mark` then has."""
    if os.environ["RANK"] == str(rank):
        kill_at_call(module, name, call=call)
        at_call(module, name, mark.touch, call=call)  # what is put in last comes first


def poison(step: int, what: str) -> None:
    """At training step `step` the loss is nan ("loss"), or finite with gradients that are nan ("gradient")."""
    module: Any = importlib.import_module("megatron_tiedlora.engine.runner")
    weighted = module.Losses.weighted
    steps = [0]

    def look(trainer: Any, *_: Any) -> None:
        steps[0] = trainer.last_step + 1

    def poisoned(losses: Any, loss: Any, segments: Any) -> Any:
        if steps[0] == step and loss.requires_grad:
            loss = loss * float("nan") if what == "loss" else loss + (loss * 0.0).sqrt()
        return weighted(losses, loss, segments)

    before_call("megatron_tiedlora.training.loop", "Trainer._train_step", look)
    module.Losses.weighted = poisoned


def scripted_validation(losses: dict[int, float]) -> None:
    """The validation loss after each step is given, and is 10 elsewhere."""
    module: Any = importlib.import_module("megatron_tiedlora.training.loop")
    module.Evaluation.losses = lambda _, runs: {run.name: losses.get(run.progress.step, 10.0) for run in runs}


def limit_files(module: str, name: str, size: int, *, call: int = 1) -> None:
    """From the `call`-th call of `module.name` on no file can grow beyond `size` bytes, as on a disk that is full."""
    limits = (size, resource.RLIM_INFINITY)
    at_call(module, name, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits), call=call)


def all_of(*preludes: Callable[[], None]) -> None:
    """One prelude after the other."""
    for prelude in preludes:
        prelude()


def at_call(module: str, name: str, act: Callable[[], object], *, call: int = 1) -> None:
    """`act` is called before the `call`-th call of `module.name`."""
    calls = iter(range(1, call + 1))

    def look(*_: Any) -> None:
        if next(calls, None) == call:
            act()

    before_call(module, name, look)


def before_call(module: str, name: str, look: Callable[..., Any]) -> None:
    """Every call of `module.name` calls `look` with the same positional arguments first."""
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original = getattr(holder, last)

    @functools.wraps(original)
    def watched(*positional: Any, **keywords: Any) -> Any:
        look(*positional)
        return original(*positional, **keywords)

    setattr(holder, last, watched)


if __name__ == "__main__":
    chosen = next(argument for argument in sys.argv[1:] if argument.startswith("--prelude="))
    sys.argv = [str(TRAIN), *(argument for argument in sys.argv[1:] if argument != chosen)]
    globals()[chosen.partition("=")[2]]()
    runpy.run_path(str(TRAIN), run_name="__main__")
