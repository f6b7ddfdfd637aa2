"""Checks several ranks: compares each possible layout with one rank, checks the network, and kills a rank.

A rank is started with   python -m megatron_tiedlora.selfcheck.test_ranks FOLDER FIRST CASES

FOLDER has a small model, and rank 0 writes the losses and the adapter of each case to FOLDER. CASES is a JSON list of
cases, and FIRST is the number of the first case. Environment variables set the rank and the master address. If FIRST is
"killed", the ranks train the first case until the last rank kills itself. If it is "messages", they time messages.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base import child_process, presets
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_weights import write_random_model
from megatron_tiedlora.runtime import ending, launch_env, machine, process_group
from megatron_tiedlora.selfcheck import parts, reference, running, step_bench
from megatron_tiedlora.selfcheck.timing import seconds_of_call

pytestmark = pytest.mark.gpu

ADAPTER, RESULT, MODEL, KILLED, MESSAGES = "adapter.safetensors", "result.json", "model", "killed", "messages"
STEPS, SAMPLES, RATE = 3, 16, 1e-3  # steps of a case, samples of a step on all ranks, and the learning rate
SIZES = (1, 2, 4, 8)
# A model that eight ranks can partition in any layout. Its vocabulary size is odd.
SHAPE = presets.small_llama(1003, 512, 768, 8, 16, 8)
SHAPE["architectures"] = ["LlamaForCausalLM"]  # so that transformers is not needed
# Relative errors of losses and of the adapter's change. Elements with tiny gradients may change with either sign.
LOSS_BOUNDS = {"fp32": 1e-5, "bf16": 2e-2}
CHANGE_BOUND = 5e-3
# Few cases per launch, so that a crash loses only these, and so that the communicators fit in memory. A layout has six
# communicators of 0.3 to 0.7 GB each on NVLink, which are freed only when the process ends.
CASES_OF_A_START = 6
SHARING = (2, 30)  # the first version of NCCL in which several ranks can share a GPU
SHARING_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
NOTICED_SECONDS = 45.0  # from the death of a rank; 30 of them are the limit of the heartbeat (docs/clusters.md)
# Fractions of the part's time. One rank must have finished by the first, and all layouts by the second. The ranks of
# the test that kills one must be training by the third. Messages are timed by the fourth.
ALONE, LAYOUTS, WORKING, TIMED = 0.25, 0.75, 0.9, 0.97
CTAS = "NCCL_MIN_CTAS"  # the least blocks of a message's kernel
WIDTH = {"cpu": 256, "cuda": 8192}  # of the square matrices of messages and matmuls
_POLL_SECONDS = 0.1
DOCTOR_SECONDS = 30.0  # limit for the ranks to connect, and for each answer
DIFFERS_FIX = (
    "several ranks compute wrong results: run `tiedlora doctor`, and this part again with NCCL_DEBUG=INFO and"
    " NCCL_P2P_DISABLE=1; if the results are then correct, PCIe settings (IOMMU, ACS) break copies between GPUs"
)
FAILED_FIX = "see the rank's output in the report's folder; NCCL_DEBUG=INFO shows more"
LOST_FIX = "see docs/clusters.md on lost ranks, and the ranks' output in the report's folder"


class Case(NamedTuple):
    """A layout, a ZeRO stage and a dtype of the base model. Data-parallel size = world size / (tp x pp)."""

    tp: int = 1
    pp: int = 1
    zero: int = 1
    dtype: str = "fp32"
    sp: bool = True

    def named(self, world_size: int) -> str:
        """Return a short name of the case for a number of ranks."""
        words = [f"TP{self.tp}", f"PP{self.pp}", f"DP{world_size // (self.tp * self.pp)}", f"ZeRO-{self.zero}"]
        return f"{' '.join(words)}, {self.dtype}{'' if self.sp or self.tp == 1 else ', whole sequences'}"


def possible_ranks(device: str) -> tuple[int, dict[str, str], str]:
    """Return how many ranks can be started here, the environment variables that they need, and why so many."""
    if device == "cpu":
        return 2, {}, "two on a CPU, over gloo"
    count = torch.cuda.device_count()
    if count > 1:
        usable = max(size for size in SIZES if size <= count)
        return usable, {}, f"one for each of {count} GPUs" if usable == count else f"of {count} GPUs"
    found = loaded_nccl()
    text = ".".join(map(str, found)) if found else "unknown"
    if found < SHARING:
        wanted = ".".join(map(str, SHARING))
        return 1, {}, f"one GPU, which several ranks can share since NCCL {wanted}; this is {text}"
    return 2, {SHARING_VARIABLE: "1"}, f"two on one GPU, with {SHARING_VARIABLE}=1 of NCCL {text}"


def loaded_nccl() -> tuple[int, ...]:
    """Return the version of NCCL in this process, even if it is preloaded; () if it cannot be found."""
    torch.cuda.is_available()  # makes sure that torch has loaded its libraries
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libnccl" in line}
    for name in (None, *sorted(paths)):
        number = ctypes.c_int()
        try:
            ctypes.CDLL(name).ncclGetVersion(ctypes.byref(number))
        except (AttributeError, OSError):
            continue
        return number.value // 10000, number.value // 100 % 100, number.value % 100
    return ()


def cases_of(world_size: int, device: str, *, is_long: bool = True) -> tuple[Case, ...]:
    """Return test cases for all layouts, ZeRO stages, runs without sequence parallelism and, on a GPU, bf16.

    The short form has only ZeRO stages 1 and 3, and not bf16.
    """
    pairs = [(tp, pp) for tp in SIZES for pp in SIZES if world_size % (tp * pp) == 0]
    layouts = [Case(tp, pp) for tp, pp in pairs]
    engines = [Case(zero=zero) for zero in ((0, 2, 3) if is_long else (3,))]
    narrow = [Case(tp=tp, dtype="bf16") for tp in (world_size, world_size // 2)] if device == "cuda" and is_long else []
    return tuple(dict.fromkeys([*layouts, *engines, Case(tp=world_size, sp=False), *narrow]))


class EndedRanks(NamedTuple):
    """The exit statuses and outputs of ranks that have ended. The status is None if a rank exceeded its time limit.

    Attributes:
        seconds: time from the first failure to the end of the last rank; 0 if no rank failed.
    """

    statuses: list[int | None]
    outputs: list[str]
    seconds: float

    def why(self) -> str:
        """Return the last error of the first rank that failed or did not end; "" if all succeeded."""
        wrong = [rank for rank, status in enumerate(self.statuses) if status]
        slow = [rank for rank, status in enumerate(self.statuses) if status is None]
        if not wrong and slow:
            return f"not finished in time; the last line of rank {slow[0]}: {last_error(self.outputs[slow[0]])}"
        return last_error(self.outputs[wrong[0]]) if wrong else ""


@dataclass(eq=False)
class Ranks:
    """The ranks that can be started on this machine.

    Attributes:
        variables: environment variables that the ranks need here.
        folder: the folder of a small model and the results; the ranks' output is written to `logs`.
        seconds: time limit of this part of the check, from the time `began`.
    """

    world_size: int
    variables: dict[str, str]
    cases: Sequence[Case]
    folder: Path
    logs: Path
    seconds: float
    began: float = field(default_factory=time.monotonic)

    @cached_property
    def alone(self) -> list[Case]:
        """The cases that a single rank trains for the comparison. There is one case for each dtype."""
        return [Case(dtype=dtype) for dtype in dict.fromkeys(case.dtype for case in self.cases)]

    def run(self, first: int | str, cases: Sequence[Case], size: int, share: float, grace: float = 5.0) -> EndedRanks:
        """Run ranks until all end, or until `grace` seconds after a failure, and return how they ended.

        Args:
            first, cases: FIRST and CASES of the ranks' command line.
            share: the fraction of the part's time limit at which the ranks are killed.
        """
        port, deadline = launch_env.free_port("127.0.0.1"), self.began + share * self.seconds
        command = [sys.executable, "-P", "-m", __name__, str(self.folder), str(first), json.dumps(cases)]
        name = f"ranks-{first}{self.variables.get(CTAS, '')}"
        logs = [self.logs / f"{name}-{number}-of-{size}.log" for number in range(size)]
        processes: list[subprocess.Popen[bytes]] = []
        failed: float | None = None
        try:
            for number, log in enumerate(logs):
                place = launch_env.rank_variables(number, size, number, "127.0.0.1", port)
                environment = {**os.environ, "OMP_NUM_THREADS": "1", **place, **self.variables}
                with log.open("wb") as out:
                    one = subprocess.Popen(command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
                processes.append(one)
            while any(one.poll() is None for one in processes) and time.monotonic() < deadline:
                if failed is None and any(one.poll() for one in processes):
                    failed = time.monotonic()
                    deadline = min(deadline, failed + grace)
                time.sleep(_POLL_SECONDS)
            statuses = [one.poll() for one in processes]
        finally:
            for one in processes:
                one.kill()
                one.wait()
        seconds = 0.0 if failed is None else time.monotonic() - failed
        return EndedRanks(statuses, [log.read_text(errors="replace") for log in logs], seconds)

    @cache  # noqa: B019 - the object lives until the part ends
    def train(self, first: int, size: int) -> str:
        """Train the cases of a launch. Return why the ranks did not finish them, or "" if they did."""
        if size == 1:
            return self.run(first, self.alone, 1, ALONE).why()
        starts = range(first, len(self.cases), CASES_OF_A_START)
        spent = (time.monotonic() - self.began) / self.seconds
        share = spent + (LAYOUTS - spent) / len(starts)
        return self.run(first, self.cases[first : first + CASES_OF_A_START], size, share).why()

    def results(self, number: int, size: int) -> Path:
        """Return the folder with the results of a case. The test fails if there are no results."""
        why = self.train(0 if size == 1 else number - number % CASES_OF_A_START, size)
        found = self.folder / f"{size}-{number}"
        said = sorted(file.read_text().strip().splitlines()[-1] for file in found.glob("error*"))
        assert (found / RESULT).exists(), f"{FAILED_FIX}\n{said[0] if said else why or 'it did not finish'}"
        return found


def naming_line(output: str, victim: int) -> str | None:
    """Return the first line in which a rank reports that rank `victim` is lost; None if there is no such line."""
    lines = output.splitlines()
    return next((line.strip() for line in lines if re.search(rf"error: .*\brank {victim}\b", line)), None)


def last_error(output: str) -> str:
    """Return the last line of a rank's output that names an error, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"error|exception", line, re.IGNORECASE)]
    return (named or lines or ["nothing was printed"])[-1][:600]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Generate a test for each case of this machine, or one skipped test if only one rank can be started."""
    if "case" in metafunc.fixturenames:
        device = parts.option(metafunc.config, "device")
        size = possible_ranks(device)[0]
        is_long = bool(parts.option(metafunc.config, "long"))
        cases = cases_of(size, device, is_long=is_long) if size > 1 else [Case()]
        metafunc.parametrize("case", cases, ids=lambda case: case.named(size))


@pytest.fixture(scope="module")
def ranks(pytestconfig: pytest.Config, device: torch.device, is_long: bool) -> Iterator[Ranks]:
    """Yield the ranks that can be started on this machine, or skip the test if only one rank can be started."""
    size, variables, why = possible_ranks(device.type)
    if size == 1:
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="check_gpu-ranks-") as name:
        folder = Path(name)
        write_random_model(SHAPE, folder / MODEL, name="a small model", seed=0)
        logs = Path(parts.option(pytestconfig, "folder") or folder)
        cases = cases_of(size, device.type, is_long=is_long)
        yield Ranks(size, variables, cases, folder, logs, parts.seconds_left(pytestconfig))


def test_layout(case: Case, ranks: Ranks, tell: parts.Tell) -> None:
    """Compare the losses and the adapter of a layout with the results of one rank. The ranks also compare replicas."""
    expected = ranks.results(ranks.alone.index(Case(dtype=case.dtype)), 1)
    compare(tell, case, ranks.results(ranks.cases.index(case), ranks.world_size), expected)


def compare(tell: parts.Tell, case: Case, found: Path, expected: Path) -> None:
    """Compare the results of a case with the results of one rank."""
    losses, one = (json.loads((folder / RESULT).read_text()) for folder in (found, expected))
    steps = [torch.tensor(values, dtype=torch.float64) for values in zip(losses, one, strict=True)]
    apart = {str(number): reference.relative(*values) for number, values in enumerate(steps, start=1)}
    worst = reference.worst_of(apart)
    tell(f"error of the loss of step {worst}", apart[worst])
    assert apart[worst] <= LOSS_BOUNDS[case.dtype], DIFFERS_FIX
    if case.dtype != "fp32":
        return
    adapter, alone = load_file(found / ADAPTER), load_file(expected / ADAPTER)
    # The norm of AdamW's change is about steps x learning rate x sqrt(elements), for any gradient.
    change = STEPS * RATE
    errors = {
        name: float((adapter[name] - tensor).norm()) / (change * tensor.numel() ** 0.5)
        for name, tensor in alone.items()
    }
    worst = reference.worst_of(errors)
    tell(f"error relative to the change of {worst}", errors[worst])
    assert errors[worst] <= CHANGE_BOUND, DIFFERS_FIX


def test_killed_rank(ranks: Ranks, tell: parts.Tell) -> None:
    """Kill the last rank during training, and check that the other ranks end in time and report the lost rank."""
    victim = ranks.world_size - 1
    ended = ranks.run(KILLED, [Case(tp=2)], ranks.world_size, WORKING, grace=NOTICED_SECONDS + 15)
    assert ended.statuses[victim] == -signal.SIGKILL, f"{FAILED_FIX}\n{ended.why()}"
    tell("seconds until the others ended", ended.seconds)
    said = next((line for output in ended.outputs[:victim] if (line := naming_line(output, victim))), None)
    tell("they say", said or "nothing about it")
    assert ended.seconds <= NOTICED_SECONDS and all(ended.statuses[:victim]) and said is not None, LOST_FIX


@pytest.mark.if_time
@pytest.mark.parametrize("ctas", ["0", "8", *(pytest.param(number, marks=pytest.mark.long) for number in ("4", "16"))])
def test_messages(ctas: str, ranks: Ranks, tell: parts.Tell) -> None:
    """Time messages of a large matrix on all ranks, alone and beside a matmul, with at least so many blocks."""
    if ctas != "0" and not torch.cuda.is_available():
        pytest.skip(f"{CTAS} is a variable of NCCL")
    result = ranks.folder / RESULT
    result.unlink(missing_ok=True)
    variables = {**ranks.variables, **({CTAS: ctas} if ctas != "0" else {})}
    ended = replace(ranks, variables=variables).run(MESSAGES, [], ranks.world_size, TIMED)
    if None in ended.statuses and not any(ended.statuses):
        pytest.skip(parts.NO_TIME)
    assert result.exists(), f"{FAILED_FIX}\n{ended.why()}"
    for name, value in json.loads(result.read_text()).items():
        tell(name, value)


def test_doctor(ranks: Ranks, gpu: torch.device, tell: parts.Tell) -> None:
    """Run the all-reduces of `tiedlora doctor` on all GPUs of this host, and check the results."""
    count = torch.cuda.device_count()
    if count == 1:
        pytest.skip("there is one GPU")
    command = [
        *(sys.executable, "-P", "-m", "megatron_tiedlora", "doctor"),
        "--json=-",
        f"--tensor_parallel={max(s for s in SIZES if count % s == 0)}",
        f"--master_port={launch_env.free_port()}",
        f"--timeout_seconds={DOCTOR_SECONDS:.0f}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DOCTOR_SECONDS + 90)
    assert done.stdout.strip(), f"run `tiedlora doctor` by hand\n{last_error(done.stderr)}"
    found = json.loads(done.stdout)
    for group in found["groups"]:
        name = f"all-reduce over {len(group['ranks'])} GPUs ({group['kind']})"
        tell(f"{name} of 64 MB, GB/s of a link", group["bus_bytes_per_second"] / 1e9)
    assert all(group["correct"] for group in found["groups"]), DIFFERS_FIX
    parts.report((machine.Finding.model_validate(each) for each in found["findings"]), tell)


# One rank -------------------------------------------------------------------------------------------------------------


def started(case: Case, folder: Path, rank: int, world_size: int, **changes: Any) -> step_bench.Started:
    """Set up and return the run of a case, with the same samples for every layout. `changes`: see `plan_benchmark`."""
    rows = SAMPLES // (world_size // (case.tp * case.pp))
    settings = running.step_settings(
        str(folder / MODEL),
        f"--dtype={case.dtype}",
        f"--tensor_parallel={case.tp}",
        f"--pipeline_parallel={case.pp}",
        f"--sequence_parallel={str(case.sp).lower()}",
        f"--ds_config=zero{case.zero}.json",
        "--rows=2",
        f"--micro_batches={rows // 2}",
        "--length=64",
        "--compile=false",
    )
    plan = step_bench.plan_benchmark(settings, rank=rank, world_size=world_size, timeout_minutes=1.0, **changes)
    return step_bench.start(plan, settings)


def run_case(case: Case, folder: Path, rank: int, world_size: int, results: Path) -> None:
    """Train the steps of a case. Rank 0 writes the results to the folder `results`."""
    run = started(case, folder, rank, world_size, learning_rate=RATE, replica_check_steps=STEPS)
    losses = [run.take(next(run.loader)).loss for _ in range(STEPS)]
    state = run.runner.full_state(ONLY, run.plan.layout_of(run.plan.adapter))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, results / ADAPTER)
        (results / RESULT).write_text(json.dumps(losses))
    run.runner.engine.destroy()


def run_until_killed(case: Case, folder: Path, rank: int, world_size: int) -> int:
    """Train with a heartbeat, as tiedlora train does, until the last rank kills itself. Return the exit status."""
    with ending.reported_end() as end:
        run = started(case, folder, rank, world_size)
        end.watch_peers(1.0)
        end.finished_step = lambda: run.train_step.finished[ONLY]
        for number in count():
            run.take(next(run.loader))
            if number == STEPS and rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
    return end.status


def time_messages(device: torch.device, width: int) -> dict[str, float]:
    """Return the milliseconds of a matmul, of messages of its matrix, and of both at once, on all ranks together.

    Where both at once take as long as the longer one, the message is hidden.
    """
    whole, right = (torch.randn(width, width, device=device).to(running.compute_dtype(device)) for _ in range(2))
    part = whole[: width // distributed.get_world_size()].clone()
    found = {"ms of a matmul": 1e3 * seconds_of_call(partial(torch.mm, right, right), device)}
    send = {
        "an all-gather": partial(distributed.all_gather_into_tensor, whole, part, async_op=True),
        "a reduce-scatter": partial(distributed.reduce_scatter_tensor, part, whole, async_op=True),
    }

    for name, start in send.items():
        for beside, work in (("", lambda: None), (" beside a matmul", partial(torch.mm, right, right))):
            step = lambda start=start, work=work: (start(), work())[0].wait()  # noqa: E731
            found[f"ms of {name}{beside}"] = 1e3 * seconds_of_call(step, device)
    return found


def main(argv: Sequence[str]) -> int:
    """Train the cases that the command line lists. Return the exit status."""
    child_process.end_with_parent()
    folder, cases = Path(argv[0]), [Case(*case) for case in json.loads(argv[2])]
    launch_env.prepare_environment()
    rank, world_size = launch_env.rank_and_world_size()
    if argv[1] == KILLED:
        return run_until_killed(cases[0], folder, rank, world_size)
    if argv[1] == MESSAGES:
        device = process_group.join_process_group(1.0, expected_ranks=world_size)
        found = time_messages(device, WIDTH[device.type])
        if rank == 0:
            (folder / RESULT).write_text(json.dumps(found))
        process_group.leave_process_group()
        return 0
    for number, case in enumerate(cases, start=int(argv[1])):
        results = folder / f"{world_size}-{number}"
        results.mkdir(exist_ok=True)
        try:
            run_case(case, folder, rank, world_size, results)
        except UserError as error:  # raised on every rank, so all of them continue with the next case
            (results / f"error{rank}").write_text(str(error))
        except Exception:
            (results / f"error{rank}").write_text(traceback.format_exc())
            traceback.print_exc()
            os._exit(1)  # a normal exit would wait for peers, which may wait for this rank
    process_group.leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
