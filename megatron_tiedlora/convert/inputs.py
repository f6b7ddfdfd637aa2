"""What every conversion starts from: a native adapter, the base it was trained on, and an output that is free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.checkpoint.base_identity import MERGE_RECORD, BaseIdentity, base_differences, identify_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, NativeAdapter, load_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.model.weights import weight_rules

EXPORT_RECORD = "tiedlora_export.json"  # in a PEFT folder: which adapter it was made from, for which base


def open_inputs(adapter: str, model: str | None) -> tuple[ModelSource, NativeAdapter]:
    """The adapter in the folder `adapter` and its base: `model`, or the one that the adapter names.

    Whether that is the base that it was trained on is for `check_base` to say.

    Raises:
        UserError: no adapter there, or no such base.
    """
    folder = user_path(adapter)
    if not (folder / CONFIG_FILE).is_file() and (folder / "adapter" / CONFIG_FILE).is_file():
        raise UserError(f"--adapter {adapter}: this is a run folder; give {Path(adapter) / 'adapter'}")
    native = load_adapter(folder)
    try:
        source = find_model(model or native.base.name)
    except UserError as error:
        if model is not None:
            raise
        raise UserError(f"{folder}: its base cannot be found; give it with --model ({error})") from None
    return source, native


@dataclass(frozen=True)
class CheckedBase:
    """A base that an adapter belongs to, or that it is used with all the same.

    Attributes:
        differences: what of it is another one than in training (--base_differs).
        notes: what a user should know of it.
    """

    identity: BaseIdentity
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What a converted adapter or model says of the base that it was made for or of."""
        differs = {"base_differs": list(self.differences)} if self.differences else {}
        return {
            "base_hash": self.identity.config_hash,
            "base_weights_hash": self.identity.weights_hash,
            "base_sample": self.identity.sample,
            "tokenizer": self.identity.tokenizer,
            "tokenizer_hash": self.identity.tokenizer_hash,
            **differs,
        }


def check_base(
    source: ModelSource,
    adapter: NativeAdapter,
    *,
    tokenizer: str | None = None,
    uses_tokenizer: bool = True,
    differs: bool = False,
) -> CheckedBase:
    """Compare `source` with the base that `adapter` was trained on, by its config, weights and tokenizer.

    Args:
        tokenizer: the one that is used, where it is not the base's own.
        uses_tokenizer: False where nothing is tokenised: an adapter that was trained with a tokenizer of its own then
            goes with any.
        differs: value of --base_differs.

    Raises:
        UserError: they are another base's, and not `differs`; or they are missing, or not whole.
    """
    with BaseWeights(source.weights_folder(), weight_rules(source.shape)) as weights:
        found = identify_base(source, weights, adapter.base.dtype, tokenizer=tokenizer)
    if not uses_tokenizer and adapter.base.tokenizer is not None:
        trained = adapter.base
        found = replace(found, tokenizer=trained.tokenizer, tokenizer_hash=trained.tokenizer_hash)
    merged = (source.weights_folder() / MERGE_RECORD).is_file()
    if merged and found.weights_hash != adapter.base.weights_hash and not differs:
        raise UserError(f"{source.name}: an adapter is merged into it already; give the plain base with --model")
    notes = adapter.check_base(found, source="--adapter", differs=differs)
    return CheckedBase(found, base_differences(adapter.base, found), notes)
