"""The end of a run: scores with the best adapter, the plot, both exports and their check, and what to do next."""

from __future__ import annotations

import json
import shutil

from megatron_tiedlora.checkpoint.atomic import write_json
from megatron_tiedlora.checkpoint.native_adapter import load_adapter
from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.convert.export_peft import export_peft, peft_base, serve_hint
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.verify import format_comparisons, verify_export
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.pipeline.engine import all_open
from megatron_tiedlora.training.loop import Trainer
from megatron_tiedlora.training.run_data import MAX_NEW_TOKENS
from megatron_tiedlora.training.run_folder import RunFolder, plot_losses, read_metrics
from megatron_tiedlora.training.validation import Scores, score_by_decoding


def score(trainer: Trainer) -> Scores | None:
    """Greedy decoding of the run's scored set with the adapter as it stands; None where the run has no such set.

    Decoding does not run through a pipeline in this version, so with several stages there is no score either.
    """
    plan, data = trainer.plan, trainer.data
    if data.scored is None or plan.grid.pp_size > 1:
        return None
    trainer.runner.engine.eval()
    with trainer.stop.deferred():
        return score_by_decoding(
            trainer.runner.stage,
            data.scored,
            tokenizer=data.tokenizer,
            config=plan.source.config,
            grid=plan.grid,
            device=trainer.device,
            max_new_tokens=MAX_NEW_TOKENS,
            check_stop=trainer.check_stop,
            progress=trainer.is_main,
        )


def use_best_adapter(trainer: Trainer) -> None:
    """Put the best adapter's values into the model (not into the optimizer: training is over)."""
    bank = trainer.runner.bank
    best = load_adapter(trainer.folder.checkpoints / f"step_{trainer.progress.best_step}")
    with trainer.stop.deferred():
        with all_open(bank, trainer.plan.engine):
            bank.load_full(best.state)
        trainer.check_stop()


def record_score(trainer: Trainer, moment: str, scores: Scores | None) -> None:
    """Keep a score ("before" or "after" training) in scores.json; a resumed run finds the first one there.

    Raises:
        UserError: it cannot be written; on every rank.
    """
    if scores is None:
        return

    def write() -> None:
        file = trainer.folder.scores
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        kept[moment] = {"metric": scores.metric, "score": scores.mean, "samples": scores.num_samples}
        write_json(file, kept)

    decided_by_rank_0(write, trainer.device)


def summary_lines(trainer: Trainer) -> list[str]:
    """The table that a run ends with: validation loss and score before and after. Read from the run folder."""
    losses = [row for row in read_metrics(trainer.folder.metrics) if row["split"] == "validation"]
    best = trainer.progress
    rows = ["", f"{'':<30}{'before':>10}{'after':>10}"]
    start = f"{losses[0]['loss']:.4f}" if losses and losses[0]["step"] == 0 else "-"
    rows.append(f"{'validation loss':<30}{start:>10}{best.best_metric:>10.4f}   (best, step {best.best_step})")
    if losses and losses[0]["step"] == 0 and losses[0]["loss"] <= (best.best_metric or 0.0):
        rows.append("training made the validation loss no better: try another --learning_rate or more data")
    file = trainer.folder.scores
    scores = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if scores:
        before, after = (f"{scores[m]['score']:.1%}" if m in scores else "-" for m in ("before", "after"))
        name = f"exact match, {next(iter(scores.values()))['samples']} held out"
        rows.append(f"{name:<30}{before:>10}{after:>10}")
    return rows


def export(trainer: Trainer) -> list[str]:
    """Plot and export to PEFT, and for the demo also merge and verify both; on rank 0. Returns the lines to print.

    Merging and verifying take a model's size in disk and memory, so for other runs they are left to the tools.

    Raises:
        UserError: an export that does not compute what the adapter computes.
        RunStopped: a signal; by now no other rank waits for this one.
    """
    trainer.stop.raise_if_wished()
    folder, source, settings = trainer.folder, trainer.plan.source, trainer.plan.settings
    plot_losses(folder.metrics, folder.path / "loss.png")
    adapter = load_adapter(folder.adapter)
    merged, peft = folder.path / "merged", folder.path / "peft"
    shutil.rmtree(peft, ignore_errors=True)  # of an earlier end of this run, whose best adapter may have been another
    export_peft(source, adapter, peft)
    if settings.task != "demo":
        return []
    shutil.rmtree(merged, ignore_errors=True)
    tokenizer = trainer.data.tokenizer if settings.tokenizer else None
    merge_adapter(source, adapter, merged, tokenizer=tokenizer, progress=True)
    results = verify_export(source, adapter, merged=merged, peft=peft)
    table = format_comparisons(results)
    if not all(row.passed for row in results):
        raise UserError(f"{folder.path}: an export differs from the adapter:\n{table}")
    return ["", table]


def next_steps(trainer: Trainer) -> list[str]:
    """What a user has and may do now, with commands."""
    path, settings = trainer.folder.path, trainer.plan.settings
    peft = path / "peft"
    base = peft_base(trainer.plan.source)
    lines = [
        "",
        f"run folder  {path}",
        f"  adapter/  the Tied-LoRA adapter, {_size(trainer.folder)}",
        "  peft/     the same as a LoRA adapter for PEFT, vLLM and others",
    ]
    if (path / "merged").is_dir():
        lines += ["  merged/   the base with the adapter merged in, for transformers", "", "next"]
        lines.append(f'  AutoModelForCausalLM.from_pretrained("{path / "merged"}")')
    else:
        lines += [
            "",
            "next",
            f"  python tools/merge_adapter.py --adapter {path / 'adapter'} --output {path / 'merged'}",
        ]
        lines.append(f"  python tools/verify_export.py --adapter {path / 'adapter'} --peft {peft}")
    lines.append(f"  {serve_hint(peft, base, settings.rank)}")
    return lines


def _size(folder: RunFolder) -> str:
    size = sum(file.stat().st_size for file in folder.adapter.iterdir())
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
