"""Sample from saved adapters beside the models of a service: hold those that were used last, and the base alone.

Saved weights never change, so they are read once. All ranks hold the same ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_identity import check_same_base
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Agree
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.service.operations import Failure, OperationResult, Sample
from megatron_tiedlora.service.sampler import sample_all
from megatron_tiedlora.training.build import BuiltModel, make_adapter

MOST_ADAPTERS = 32  # in memory, unless one command uses more
_BASE = "base"  # the name of an adapter without layers; names of models have colons, and of folders slashes


class Sampler:
    """Runs samples on one rank. All ranks call it with the same samples."""

    def __init__(
        self,
        plan: RunPlan,
        built: BuiltModel,
        *,
        decode: Callable[[Sequence[int]], str],
        agree: Agree,
        cache_bytes: int,
    ) -> None:
        """Prepare to sample beside training. For the arguments see `sample_all`."""
        runner = built.runner
        self._plan, self._identity, self._runner = plan, built.base_identity, runner
        self._decoder = Decoder(
            runner.stage, runner.groups, plan.source.shape, calls_together=plan.engine.zero_stage == 3
        )
        self._options: dict[str, Any] = {"grid": plan.grid, "decode": decode, "agree": agree}
        self._options["cache_bytes"] = cache_bytes
        empty = TiedAdapter(AdapterShard(plan.adapter, (), plan.grid.tp_rank, plan.grid.tp_size))
        runner.adapters[_BASE] = empty.to(runner.device)
        self._held = dict[str, None]()  # folders, the longest unused first

    def __call__(self, samples: Sequence[Sample]) -> list[OperationResult]:
        """Return the results on rank 0, in the order of the samples."""
        failures = dict[str, Failure]()
        for folder in dict.fromkeys(sample.folder for sample in samples if sample.folder):
            try:
                self._hold(folder)
            except UserError as error:  # raised on every rank
                failures[folder] = Failure(str(error), by_user=False)
        for folder in list(self._held)[: max(0, len(self._held) - MOST_ADAPTERS)]:
            if all(sample.folder != folder for sample in samples):
                del self._held[folder], self._runner.adapters[folder]
        there = [sample for sample in samples if sample.folder not in failures]
        self._runner.engine.module.eval()
        names = {folder: folder or _BASE for folder in (*self._held, "")}
        results = iter(sample_all(self._decoder, there, adapters=names, **self._options) if there else [])
        return [failures[one.folder] if one.folder in failures else next(results, _NONE) for one in samples]

    def _hold(self, folder: str) -> None:
        if folder not in self._held:
            found = decided_by_rank_0(lambda: load_native_adapter(Path(folder)), kind=NativeAdapter)
            check_same_base(found.base_identity, self._identity, source=folder, differs=False)
            self._runner.adapters[folder] = make_adapter(self._plan, found.config, found.state, self._runner.device)
        self._held[folder] = self._held.pop(folder, None)


_NONE = Failure("rank 0 has the result", by_user=False)
