"""Plan the adapters of a run, and prepare their data.

A run trains the adapters in the --adapters file, or a single adapter, whose name is "". Each adapter has its own plan.
Settings that the engine does not support for several adapters are rejected here. Each host reads and tokenises the data
once, before any rank waits for other ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.messages import UserError, naming, user_path
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.batch import longest_prompt
from megatron_tiedlora.config.cli import RUN_OF_ALL, check_folders, check_halving, read_adapters
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.config.settings import NO_TRAIN_FILE, Settings, make_settings
from megatron_tiedlora.data import cache, chat
from megatron_tiedlora.data.splits import files_of, open_encoding, read_split
from megatron_tiedlora.data.task import Example, Reading
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.token_dataset import TokenDataset, permutation
from megatron_tiedlora.evaluation.answering import ScoredSet, encode_scored
from megatron_tiedlora.planning.counted_steps import epochs_of
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.runtime.run_folder import RunFolder, choose_run_folder, last_run_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DS_CONFIG = "zero0.json"  # the default with --adapters; ZeRO-1 and 2 clip all adapters together, ZeRO-3 shards the base

Plans = Mapping[str, RunPlan]  # by adapter name; plans differ only in settings that belong to an adapter


def adapter_settings(settings: Settings) -> dict[str, Settings]:
    """Return the settings of each adapter of a run, by name. Without --adapters, the only name is `ONLY`.

    Raises:
        UserError: the --adapters file is invalid.
    """
    if settings.adapters is None:
        return {ONLY: settings}
    found, output_dir = {}, settings.output_dir
    folder = last_run_folder(settings).path if output_dir is None else user_path(output_dir)
    for name, given in read_adapters(settings.adapters, settings).items():
        own = {"ds_config": DS_CONFIG, **given.model_dump(exclude_unset=True)}
        if settings.resume != "none":  # a resumed adapter with --init_from has its settings in this folder
            own = {"output_dir": str(folder / name), **own}
        found[name] = make_settings(own)
    return found


def plan_adapters(
    settings: Settings, *, rank: int, world_size: int, weights: bool = True, source: ModelSource | None = None
) -> dict[str, RunPlan]:
    """Return the plan of each adapter of a run, by name. The model is looked up only once.

    Args:
        weights, source: see `plan_run`.

    Raises:
        UserError: see `plan_run`. The message names the file and the adapter if --adapters is given.
    """
    file, plans = settings.adapters, dict[str, RunPlan]()
    entries, shows = adapter_settings(settings).items(), rank == 0 and file is not None
    for name, own in progress_bar("planning", "adapter", entries, delay=0.5, leave=True, shows=shows):
        found = next(iter(plans.values())).source if plans else source
        with naming(name and f"{file}: {name}"):
            plans[name] = plan_run(own, rank=rank, world_size=world_size, weights=weights, source=found)
    if settings.halving:
        check_halving({name: plan.settings for name, plan in plans.items()})
    shared = shared_plan(plans)
    if file is not None:
        check_clipping(shared)
    for name, plan in plans.items():
        if plan.dtype_name != shared.dtype_name:
            raise UserError(
                f"{file}: {name} needs the base in {plan.dtype_name}, but other adapters need {shared.dtype_name}."
                " Give --dtype"
            )
    return plans


def shared_plan(plans: Plans) -> RunPlan:
    """Return the plan whose pipeline stages all adapters use. Its first adapted layer is the lowest of all plans."""
    return min(plans.values(), key=lambda plan: plan.adapter.layers[0])


def check_clipping(plan: RunPlan) -> None:
    """Raise UserError if the engine would clip the gradients of several adapters together."""
    if plan.engine.zero_stage in (1, 2):
        raise UserError(
            f"--ds_config {plan.settings.ds_config}: ZeRO-{plan.engine.zero_stage} clips the gradients of all adapters"
            " together, and would shard only their few MB. Use zero0.json, or zero3.json to shard the base"
        )


# Folders -------------------------------------------------------------------------------------------------------------


def adapter_folders(plans: Plans, folder: RunFolder) -> dict[str, RunFolder]:
    """Return the folder of each adapter: without --adapters the run folder, else its output_dir or RUN_FOLDER/NAME."""
    if set(plans) == {ONLY}:
        return {ONLY: folder}
    given = {name: plan.settings.output_dir or str(folder.path / name) for name, plan in plans.items()}
    return {name: RunFolder(user_path(output_dir)) for name, output_dir in given.items()}


def check_run_folders(settings: Settings, plans: Plans, folder: RunFolder) -> None:
    """Raise UserError if an adapter's folder is unusable, or conflicts with the run folder or another adapter's."""
    own = {name: str(of.path) for name, of in adapter_folders(plans, folder).items() if of is not folder}
    check_folders(str(settings.adapters), {RUN_OF_ALL: str(folder.path), **own})
    for name, output_dir in own.items():
        with naming(name):
            choose_run_folder(plans[name].settings.completed(output_dir=output_dir))


_DRAW_STREAM = 2**32 + 1  # differs from the random streams of the validation split and of epochs (0, 1, ...)
MANY_CUT = 0.01  # a larger fraction of truncated training prompts causes a warning
MANY_EPOCHS = 20


@dataclass(frozen=True, kw_only=True)
class RunData(cache.TrainingData):
    """The tokenised splits and the tokenizer of a run.

    The `validation` samples of `TrainingData` select the best checkpoint. A resumed run must have the same `sha256`.

    Attributes:
        scored: test samples that the model answers before and after training, or None.
        scored_validation: samples that the model answers at each evaluation; None if the loss selects checkpoints.
        reading: the user's settings for reading rows.
    """

    tokenizer: PreTrainedTokenizerBase
    scored: ScoredSet | None
    scored_validation: ScoredSet | None
    reading: Reading

    @property
    def notes(self) -> list[str]:
        """Notes about the data that a run prints first: its sources, the chat template, and dropped turns."""
        lines = [*self.mix]
        if self.chats:
            lines.append(f"chats by {chat.chat_note(self.tokenizer, self.reading)}")
        for name, split in (("train", self.train), ("validation", self.validation)):
            if split.shortened_chats:
                lines.append(
                    f"{split.shortened_chats:,} {name} chats lost {split.lost_turns:,} turns at their start to fit"
                )
        return lines

    def warnings(self, plan: RunPlan) -> list[str]:
        """Return warnings about settings and data that are probably a mistake."""
        found = [*length_warnings(plan.settings, self.train), *plan.rank_excess]
        if self.unended:
            ends = self.tokenizer.eos_token
            found.append(
                f"{chat.chat_writer(self.tokenizer, self.reading)} writes no end-of-sequence token ({ends}) after an"
                " answer, so the model does not learn to stop; give a --chat_template that ends answers with it"
            )
        return found

    @property
    def shared_sha256(self) -> str:
        """The hashes of all data that must be the same on every rank, as one text."""
        scored = (part.sha256 for part in (self.scored, self.scored_validation) if part is not None)
        return " ".join([self.sha256, *scored])


def length_warnings(settings: Settings, train: TokenDataset) -> list[str]:
    """Return warnings if many prompts are truncated, or if the run has so many epochs that it may overfit."""
    found = []
    cut, epochs = train.truncated_prompts, epochs_of(settings, len(train))
    if cut > MANY_CUT * len(train):
        found.append(
            f"{cut:,} of {len(train):,} training prompts ({cut / len(train):.1%}) lose their middle at --max_length"
            f" {settings.max_length}; raise it if the model allows, or shorten the prompts"
        )
    if epochs > MANY_EPOCHS:
        instead = f"--epochs 3 in place of --max_steps {settings.max_steps} would be shorter"
        advice = instead if settings.epochs is None else "a lower value of --epochs makes it shorter"
        found.append(f"the run sees each of the {len(train):,} training samples {epochs:,.1f} times; {advice}")
    return found


Data = Mapping[str, RunData]  # by adapter name


def prepare_all_data(plans: Plans) -> dict[str, RunData]:
    """Return the data of each adapter, by name. Adapters with equal data settings use the same data.

    Raises:
        UserError: see `prepare_data`. The message names the adapter.
    """
    data, read = {}, dict[tuple[str, int], RunData]()
    of_data = set(marked(Settings, decides="data"))
    for name, plan in plans.items():
        values = plan.settings.of_rows.model_dump_json(include=of_data), plan.max_new_tokens
        if values not in read:
            with naming(name):
                read[values] = prepare_data(plan)
        data[name] = read[values]
    return data


def counted(plans: Plans, data: Data) -> dict[str, RunPlan]:
    """Return the plans with --max_steps computed from --epochs. The message of a UserError names the adapter."""
    found = {}
    for name, plan in plans.items():
        with naming(name):
            found[name] = plan.counted(len(data[name].train))
    return found


def plan_and_read(settings: Settings, *, rank: int, world_size: int) -> tuple[dict[str, RunPlan], dict[str, RunData]]:
    """Return the plans and the data of a run by adapter name.

    This function runs all checks that a rank can make before it communicates with other ranks.

    Raises:
        UserError: see `plan_adapters`, `prepare_all_data` and `counted`.
    """
    plans = plan_adapters(settings, rank=rank, world_size=world_size)
    data = prepare_all_data(plans)
    return counted(plans, data), data


def prepare_data(plan: RunPlan) -> RunData:
    """Read, check and tokenise every split of the run.

    Raises:
        UserError: a file, a row, the tokenizer or its vocabulary is invalid, or the settings name no data.
    """
    if not plan.settings.names_data:
        raise UserError(NO_TRAIN_FILE)
    settings, shape = plan.settings.of_rows, plan.source.shape
    model_folder = plan.source.weights_folder()  # raises for a preset, which has no files
    encoding = open_encoding(settings, model_folder, vocab_size=shape.vocab_size, max_length=settings.max_length)
    tokenizer = encoding.tokenizer
    files, limit = files_of(settings), settings.timeout_minutes
    parts = cache.tokenised_once(encoding, files=files, seed=settings.seed, timeout_minutes=limit)
    drawn = list[Example]()
    if settings.eval_metric != "loss":  # random samples in file order; the first samples of a sorted file may be alike
        examples = read_split(settings, "validation", tokenizer=tokenizer)
        order = permutation(len(examples), seed=settings.seed, stream=_DRAW_STREAM)[: settings.eval_samples]
        drawn = [examples[index] for index in sorted(order.tolist())]

    def scored_set(examples: list[Example]) -> ScoredSet | None:
        if not examples:
            return None
        longest = longest_prompt(settings.max_length, shape.limit.tokens, plan.max_new_tokens)
        of_prompts, most = replace(encoding, max_length=longest), plan.max_new_tokens
        return encode_scored(examples, of_prompts, max_new_tokens=most, batch_size=settings.eval_batch_size)

    scored = scored_set(_test_examples(settings, tokenizer))
    return RunData(
        **vars(parts), tokenizer=tokenizer, scored=scored, scored_validation=scored_set(drawn), reading=encoding.reading
    )


def _test_examples(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the test samples to answer before and after training; [] if none are requested."""
    limit = get_task(settings.task).scored_rows
    if limit is None and settings.test_file is None:
        return []
    return read_split(settings, "test", tokenizer=tokenizer, limit=limit)
