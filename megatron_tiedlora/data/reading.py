"""How rows become samples and samples become tokens: the settings of a command that decide it, in one record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import AddBos, SpecialTokensInText, TrainOn, parse_columns
from megatron_tiedlora.config.settings import Settings


@dataclass(frozen=True)
class Reading:
    """What users decide about their rows. The defaults are those of the settings.

    columns: our field -> the user's field; None if rows are read as they are.
    train_on: which answers of a chat are supervised.
    chat_template: the file given in place of the tokenizer's template, for messages.
    add_bos: whether the beginning-of-sequence token is put in front.
    special_tokens: what control tokens in a row's texts mean.
    template_fields: the fields of a row that the user's prompt template names.
    trains: whether rows are trained on; else their last answers are scored, also those that are not to be trained.
    """

    columns: Mapping[str, str] | None = None
    train_on: TrainOn = "all_turns"
    chat_template: str | None = None
    add_bos: AddBos = "auto"
    special_tokens: SpecialTokensInText = "refuse"
    template_fields: tuple[str, ...] = ()
    trains: bool = True

    @classmethod
    def of(cls, settings: Settings | EvaluateSettings) -> Reading:
        """Those of a command. What it leaves to an adapter's run is the default if there is none."""
        return cls(
            columns=parse_columns(settings.columns),
            train_on=settings.train_on if isinstance(settings, Settings) else "last_turn",
            chat_template=settings.chat_template,
            add_bos=settings.add_bos or cls.add_bos,
            special_tokens=settings.special_tokens_in_text or cls.special_tokens,
            trains=isinstance(settings, Settings),
        )
