"""Generate answers to a task's held-out rows, greedily or by sampling, and score the answers. The model may be a base
model, an adapter, a merged model or a PEFT folder.

    tiedlora evaluate                                                                  the demo model on the demo task
    deepspeed --no_python tiedlora evaluate --adapter runs/NAME/adapter --task gsm8k --tensor_parallel 2
    tiedlora evaluate --adapters runs/four --task gsm8k                                all adapters of the run `four`
    tiedlora evaluate --adapters runs/four --task gsm8k --engine vllm                  answered by vLLM

`_evaluate` shows all steps of an evaluation in order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tiedlora.base.installation import require_extra, require_vllm
from megatron_tiedlora.base.messages import show
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.runtime.launch_env import prepare_environment

if TYPE_CHECKING:
    from megatron_tiedlora.base.output_folder import NewOutput
    from megatron_tiedlora.evaluation.answering import ScoredSet
    from megatron_tiedlora.evaluation.plan import EvaluationPlans
    from megatron_tiedlora.runtime.ending import End

_LIBRARIES = {"rougeL": "rouge_score", "bleu": "sacrebleu"}  # of metrics; an environment of vLLM may lack them


def main(settings: EvaluateSettings) -> int:
    """Run one rank and return the exit status: 0 if the rank finished, and 130, 143 or 138 after a signal."""
    uses_vllm, given = settings.engine == "vllm", set(os.environ)
    require_vllm("--engine vllm") if uses_vllm else require_extra("eval")
    from megatron_tiedlora.data.splits import check_files_exist

    check_files_exist(settings)
    # These import torch, which takes a second. --help, a wrong flag and a missing file do not wait for this import.
    from megatron_tiedlora.runtime.ending import reported_end

    prepare_environment()
    with reported_end() as end:
        for name in os.environ.keys() - given if uses_vllm else ():  # vLLM's processes must not read these
            del os.environ[name]
        end.unsaved = "nothing was written"
        _evaluate(settings, end)
    return end.status


def _evaluate(settings: EvaluateSettings, end: End) -> None:
    # These import transformers, which takes seconds; signals are handled already.
    from megatron_tiedlora.evaluation.answering import Answerer, answer_all, read_scored
    from megatron_tiedlora.evaluation.plan import plan_evaluations
    from megatron_tiedlora.evaluation.results import headline, score_answers, score_table, write_results

    is_main, stop, uses_vllm = end.rank == 0, end.stop, settings.engine == "vllm"
    plans = plan_evaluations(settings, rank=end.rank, world_size=end.world_size)
    plan, scored = next(iter(plans.values())), read_scored(plans)
    if not uses_vllm:
        from megatron_tiedlora.adapters.adapter_groups import ONLY
        from megatron_tiedlora.checkpoint.load_model import load_model
        from megatron_tiedlora.engine.engine import make_groups, make_process_grid
        from megatron_tiedlora.evaluation.decoder import Decoder
        from megatron_tiedlora.runtime.process_group import join_process_group

        device = join_process_group(settings.timeout_minutes, expected_ranks=end.world_size)
        end.watch_peers(settings.timeout_minutes)
        output = take_results_folder(settings, plans, scored, end)
        groups = make_groups(plan.grid, make_process_grid(plan.grid))
        load = partial(load_model, dtype=plan.dtype, base_format=plan.base_format, merged=settings.merge_adapter)
        load = partial(load, device=device, grid=plan.grid, groups=groups, stages=plan.stages, progress=is_main)
        adapters = {n: own.adapter for n, own in plans.items() if own.adapter is not None}
        stage = load(plan.source, plan.adapter if ONLY in plans else adapters)
        attention = str(stage.attention_route(device, plan.dtype))
        answerer = Answerer(Decoder(stage, groups, plan.source.shape))
    else:
        from megatron_tiedlora.integrations.vllm.answerer import VllmAnswerer

        require_extra("eval", only=[_LIBRARIES[name] for name in plan.task.metrics if name in _LIBRARIES])
        output = take_results_folder(settings, plans, scored, end)
        answerer, attention = VllmAnswerer(plans, scored), "vLLM's"
    if is_main:
        show(*headline(plans, scored, attention))
    # With vLLM, no other rank waits for this one.
    with nullcontext() if uses_vllm else stop.deferred(), closing(answerer):
        answers = answer_all(answerer, scored, plan.sampling, grid=plan.grid, agree=stop.agree, progress=is_main)
    if output is None:
        return
    stop.raise_if_requested()
    score = partial(score_answers, decoding=f"{plan.sampling}{', by vLLM' * uses_vllm}" if settings.temperature else "")
    found = {name: (own, answers[name], score(own.task.metrics, answers[name])) for name, own in plans.items()}
    with stop.deferred():  # this is short and must finish
        write_results(found, output)
    show(*score_table(found, output.path))


def take_results_folder(
    settings: EvaluateSettings, plans: EvaluationPlans, scored: Mapping[str, ScoredSet], end: End
) -> NewOutput | None:
    """Lock the results folder on rank 0 and return the folder there. Return None on all other ranks.

    The object `end` releases the folder at the end of the evaluation.

    Raises:
        UserError: the folder is in use or not empty, or ranks read different rows or use a different precision.
    """
    from megatron_tiedlora.base.output_folder import take_output_folder
    from megatron_tiedlora.base.ownership import Owner
    from megatron_tiedlora.checkpoint.load_model import check_same_dtype
    from megatron_tiedlora.evaluation.answering import check_same_rows
    from megatron_tiedlora.evaluation.plan import output_name
    from megatron_tiedlora.evaluation.results import DEFAULT_PARENT
    from megatron_tiedlora.parallel.agreement import decided_by_rank_0

    check_same_rows(list(scored.values()))
    check_same_dtype(next(iter(plans.values())).dtype_name)
    output: NewOutput | None = None

    def take() -> tuple[Path, str]:
        nonlocal output
        output = take_output_folder(
            settings.output_dir, parent=DEFAULT_PARENT, name=output_name(plans), take_over=settings.take_over
        )
        end.held.callback(output.release)
        return output.partial, output.lock.owner.start

    end.owners.append(Owner(*decided_by_rank_0(take, kind=tuple[Path, str]), is_main=end.rank == 0))
    return output


if __name__ == "__main__":
    from megatron_tiedlora.commands.front import run

    run("evaluate")
