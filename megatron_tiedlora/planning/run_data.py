"""The data of a run, read and tokenised once per host, before any rank waits for another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from megatron_tiedlora.base.errors import UserError, naming
from megatron_tiedlora.config.batch import longest_prompt
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.config.settings import NO_TRAIN_FILE, Settings
from megatron_tiedlora.data.cache import TrainingData, tokenised_once
from megatron_tiedlora.data.chat import chat_note, chat_writer, set_chat_template
from megatron_tiedlora.data.encode import Encoding
from megatron_tiedlora.data.sources import row_stream
from megatron_tiedlora.data.splits import files_of, read_split
from megatron_tiedlora.data.task import Example, Reading
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.token_dataset import permutation
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer
from megatron_tiedlora.evaluation.answering import ScoredSet, encode_scored
from megatron_tiedlora.planning.adapter_plans import Plans
from megatron_tiedlora.planning.run_plan import RunPlan, length_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DRAW_STREAM = 2**32 + 1  # differs from the stream that splits off validation rows and from those of epochs (0, 1, ...)


@dataclass(frozen=True, kw_only=True)
class RunData(TrainingData):
    """Tokenised splits and the tokenizer.

    Of `TrainingData`, the samples of `validation` choose the best checkpoint, and a resumed run must have the same
    `sha256`.

    Attributes:
        scored: samples to answer before and after training; None: none.
        scored_validation: samples to answer at every evaluation; None if the loss selects the best checkpoint.
        reading: what the user decided about rows.
    """

    tokenizer: PreTrainedTokenizerBase
    scored: ScoredSet | None
    scored_validation: ScoredSet | None
    reading: Reading

    @property
    def notes(self) -> list[str]:
        """How chats became text, and what they lost, for the first lines of a run."""
        lines = [*self.mix]
        if self.chats:
            lines.append(f"chats by {chat_note(self.tokenizer, self.reading)}")
        for name, split in (("train", self.train), ("validation", self.validation)):
            if split.shortened_chats:
                lines.append(
                    f"{split.shortened_chats:,} {name} chats lost {split.lost_turns:,} turns at their start to fit"
                )
        return lines

    def warnings(self, plan: RunPlan) -> list[str]:
        """What a user probably does not want."""
        found = [*length_warnings(plan.settings, self.train), *plan.rank_excess]
        if self.unended:
            ends = self.tokenizer.eos_token
            found.append(
                f"{chat_writer(self.tokenizer, self.reading)} writes no end-of-sequence token ({ends}) after an answer,"
                " so the model does not learn to stop; give a --chat_template that ends answers with it"
            )
        return found

    @property
    def shared_sha256(self) -> str:
        """Hash of all data that ranks must have in common."""
        scored = (part.sha256 for part in (self.scored, self.scored_validation) if part is not None)
        return " ".join([self.sha256, *scored])


Data = Mapping[str, RunData]  # by the adapter's name


def prepare_all_data(plans: Plans) -> dict[str, RunData]:
    """The data of each adapter, read once for all whose settings of data are the same.

    Raises:
        UserError: as `prepare_data`. It names the adapter.
    """
    data, read = {}, dict[tuple[str, int], RunData]()
    of_data = set(marked(Settings, decides="data"))
    for name, plan in plans.items():
        values = plan.settings.model_dump_json(include=of_data), plan.max_new_tokens
        if values not in read:
            with naming(name):
                read[values] = prepare_data(plan)
        data[name] = read[values]
    return data


def counted(plans: Plans, data: Data) -> dict[str, RunPlan]:
    """The plans whose --max_steps is counted for --epochs. Raises UserError, which names the adapter."""
    found = {}
    for name, plan in plans.items():
        with naming(name):
            found[name] = plan.counted(len(data[name].train))
    return found


def prepare_data(plan: RunPlan) -> RunData:
    """Read, check and tokenise every split of the run.

    Raises:
        UserError: a file, row, tokenizer or vocabulary does not fit, or no rows are named.
    """
    if not plan.settings.names_data:
        raise UserError(NO_TRAIN_FILE)
    settings, vocab_size = plan.settings, plan.source.shape.vocab_size
    model_folder = plan.source.weights_folder()  # raises for a preset, which has no files
    tokenizer, reading = load_tokenizer(settings.tokenizer or model_folder), Reading.of(settings)
    set_chat_template(tokenizer, settings.chat_template)
    check_vocabulary(tokenizer, vocab_size)
    encoding = Encoding(
        task=get_task(settings.task),
        tokenizer=tokenizer,
        reading=reading,
        max_length=settings.max_length,
        end_ids=end_ids(tokenizer, model_folder, vocab_size=vocab_size),
    )
    files, limit = files_of(settings), settings.timeout_minutes
    parts = tokenised_once(encoding, files=files, seed=settings.seed, timeout_minutes=limit)
    drawn = [] if settings.eval_metric == "loss" else _drawn(settings, tokenizer)
    return RunData(
        **vars(parts),
        tokenizer=tokenizer,
        scored=_encode(plan, tokenizer, _test_examples(settings, tokenizer)),
        scored_validation=_encode(plan, tokenizer, drawn),
        reading=reading,
    )


def first_source(settings: Settings, data: RunData) -> str:
    """Where the first training sample was read, for messages."""
    rows = row_stream(get_task(settings.task), "train", files=files_of(settings), reading=data.reading)
    _, (_, source) = next(islice(rows, data.first_row, None))
    return source


def _drawn(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """--eval_samples random validation samples, by the seed, in file order; files are often sorted."""
    examples = read_split(settings, "validation", tokenizer=tokenizer)
    order = permutation(len(examples), seed=settings.seed, stream=_DRAW_STREAM)[: settings.eval_samples]
    return [examples[index] for index in sorted(order.tolist())]


def _test_examples(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The test samples to answer before and after training: those that the task's record or the user asks for."""
    limit = get_task(settings.task).scored_rows
    if limit is None and settings.test_file is None:
        return []
    return read_split(settings, "test", tokenizer=tokenizer, limit=limit)


def _encode(plan: RunPlan, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> ScoredSet | None:
    if not examples:
        return None
    return encode_scored(
        examples,
        get_task(plan.settings.task),
        tokenizer,
        reading=Reading.of(plan.settings),
        longest_prompt=longest_prompt(plan.settings.max_length, plan.source.shape.limit.tokens, plan.max_new_tokens),
        model_folder=plan.source.weights_folder(),
        vocab_size=plan.source.shape.vocab_size,
    )
