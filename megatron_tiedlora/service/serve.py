"""Run one rank of a training service. `serve_rank` lists its phases in order.

Rank 0 has the HTTP server, in a thread, and the desk. Its main thread decides commands (`scheduler`), and all ranks run
them (`worker`) until a signal stops them.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterShard
from megatron_tiedlora.base.files import read_json_object
from megatron_tiedlora.base.messages import UserError, bytes_in_words, count_text, show, user_path
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.service_settings import ServiceSettings
from megatron_tiedlora.config.settings import DEFAULT_SEED
from megatron_tiedlora.data.tokenizer import end_ids, load_tokenizer
from megatron_tiedlora.engine.runner import inputs_to_fill
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, max_over_ranks
from megatron_tiedlora.planning.adapter_plans import check_clipping
from megatron_tiedlora.planning.memory import step_memory
from megatron_tiedlora.planning.planned import StepPlan, micro_batch_capacity
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.runtime.ending import End
from megatron_tiedlora.runtime.process_group import join_process_group, ranks_by_host
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.service.batches import Division
from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.http import make_app, serving, take_port
from megatron_tiedlora.service.operations import ServiceFacts
from megatron_tiedlora.service.records import Limits
from megatron_tiedlora.service.sampler import Sampler
from megatron_tiedlora.service.scheduler import Scheduler
from megatron_tiedlora.service.tokens import TokenFile
from megatron_tiedlora.service.worker import Worker, WorkerCommand
from megatron_tiedlora.training.build import build_model
from megatron_tiedlora.training.throughput import choose_kernels

_MOST_MODELS = 1024
_BYTES_PER_NUMBER = 16  # of a trained tensor: its values, gradient and two moments in fp32
_PLAN = "plan"  # the name of the plan of the layout
# Shares of the memory that is free after the base and a step have theirs.
_FOR_MODELS, _FOR_CACHES = 0.6, 0.3


def serve_rank(settings: ServiceSettings, rank: int, world_size: int, stop: StopRequests, end: End) -> None:
    """Serve until a signal stops the ranks.

    Raises:
        RunStopped: a signal stopped the service on every rank.
        UserError: the settings, the base, the layout, a folder or the address are not valid. Nothing is served then.
    """
    width = find_model(settings.model, weights=False).shape.hidden_size
    plan = plan_run(settings.train(world_size, width=width), rank=rank, world_size=world_size)
    check_clipping(plan)
    folder, grid = plan.source.weights_folder(), plan.grid
    tokenizer = load_tokenizer(settings.tokenizer or folder)
    device = join_process_group(settings.timeout_minutes, expected_ranks=world_size)
    end.watch_peers(settings.timeout_minutes)
    front = _Front()
    max_rank = settings.largest_rank(width)
    ends = end_ids(tokenizer, folder, vocab_size=plan.source.shape.vocab_size)
    decided_by_rank_0(partial(front.open, settings, plan, max_rank, ends, end))
    kernels = choose_kernels(plan, device, ranks=range(1, max_rank + 1))
    built = build_model({_PLAN: plan}, device, kernels=kernels.kernels, empty=True)
    room, to_fill = _room(settings, plan, max_rank, device), inputs_to_fill(grid.pp_size)
    division = Division(
        capacity=micro_batch_capacity({_PLAN: plan}, shares=True),
        dp_size=grid.dp_size,
        per_rank=to_fill,
        multiple=plan.layout.pad_multiple,
        shares=settings.share_micro_batches,
    )

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False))

    sampler = Sampler(plan, built, decode=decode, agree=stop.agree, cache_bytes=room.cache_bytes)
    worker = Worker(plan, built, division, sampler)
    scheduler: Scheduler | None = None
    serves: AbstractContextManager[None] = nullcontext()
    if front.desk is not None:
        scheduler = Scheduler(
            front.desk,
            round_tokens=division.capacity * grid.dp_size * to_fill,
            round_rows=sampler.most_rows if division.shares else 0,
            cache_tokens=sampler.cache_tokens,
            most_models=room.num_models,
            state_steps=settings.state_steps,
        )
        end.held.callback(scheduler.crashed, end)
        serves = front.serving(room)
    with stop.deferred(), serves:
        while True:
            stop.agree(True)
            command = decided_by_rank_0(scheduler.next if scheduler else WorkerCommand, kind=WorkerCommand)
            results = worker.run(command)
            if scheduler is not None:
                scheduler.answer(results)


@dataclass(frozen=True)
class _Room:
    """How many models fit in memory, the bytes of the largest on a rank, and the bytes for the caches of samples."""

    num_models: int
    model_bytes: float
    cache_bytes: int


def _room(settings: ServiceSettings, plan: RunPlan, max_rank: int, device: torch.device) -> _Room:
    """Return what fits into the memory that is free on every rank, after the base is there."""
    largest = AdapterShard.of_stage(
        replace(plan.adapter, method="lora", rank=max_rank), plan.stage.layers, plan.grid.tp_rank, plan.grid.tp_size
    )
    of_model = _BYTES_PER_NUMBER * float(sum(map(largest.local_size, largest.names(trained=True))))
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        here = next(ranks for ranks in ranks_by_host() if plan.grid.rank in ranks)
        free = psutil.virtual_memory().available / len(here)
    left = free - step_memory(plan.stage, StepPlan({_PLAN: plan}, False).largest).total
    (least,) = (-value for value in max_over_ranks([-left]))
    (of_model,) = max_over_ranks([of_model])
    fit = int(_FOR_MODELS * max(least, 0.0) / of_model)
    wanted = settings.max_models or min(fit, _MOST_MODELS)
    if not 1 <= wanted <= fit:
        flag = f"--max_models {settings.max_models}" if settings.max_models else f"--max_rank {max_rank}"
        raise UserError(
            f"{flag}: {count_text(fit, 'model')} of rank {max_rank} fit ({bytes_in_words(of_model)} each on a"
            f" rank, {bytes_in_words(max(least, 0.0))} are free). Give fewer, or lower --max_rank or --max_length"
        )
    return _Room(wanted, of_model, int(_FOR_CACHES * least))


class _Front:
    """What only rank 0 has: the desk, and the HTTP interface."""

    desk: Desk | None = None

    def open(
        self, settings: ServiceSettings, plan: RunPlan, max_rank: int, stop_tokens: Collection[int], end: End
    ) -> None:
        """Open the files of the service, and take its port. `end` closes the files. Raise UserError if one cannot be
        used."""
        assert settings.state is not None
        tokens, folder = TokenFile(user_path(settings.token_file)), plan.source.weights_folder()
        disk = int(settings.owner_disk_gb * 1e9)
        limits = Limits(models=settings.owner_models, rank=max_rank, tokens=settings.request_tokens, disk_bytes=disk)
        self.desk = Desk.open(user_path(settings.state), limits)
        end.held.callback(self.desk.close)
        self.facts = ServiceFacts(
            model_name=settings.model_name or settings.model,
            tokenizer_id=settings.tokenizer or settings.model_name or str(folder),
            architecture=str(read_json_object(folder / "config.json", kind="a model's config").get("model_type")),
            vocab_size=plan.source.shape.vocab_size,
            max_length=plan.settings.max_length,
            stop_tokens=tuple(sorted(stop_tokens)),
            method=settings.method,
            alpha=settings.alpha,
            seed=DEFAULT_SEED,
        )
        self._app, self._port = make_app(self.desk, tokens, self.facts), take_port(settings.host, settings.port)

    @contextmanager
    def serving(self, room: _Room) -> Iterator[None]:
        """Serve HTTP inside the block, and say where."""
        with serving(self._app, self._port) as url:
            fits = f"{count_text(room.num_models, 'model')} in memory ({bytes_in_words(room.model_bytes)} each at most)"
            show(f"serving {self.facts.model_name} at {url}: {fits}. Stop with Ctrl-C")
            yield
