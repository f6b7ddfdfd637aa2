"""The shapes of well-known models as fields of a Hugging Face config.json, for dry runs, plans and random weights.

`presets.json` has the fields that models of a family share, and of each model its sizes and what differs. `gpt-2b` is
NVIDIA's GPT-2B-001 (docs/families.md), `llama2-70b-8k` is for plans of long rows, `mistral-small` is the text model of
Mistral Small 3.1 and later, `granite` is Granite 3.3. `tiny` trains in seconds; the tokens of its tokenizer are bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import read_json_object
from megatron_tiedlora.base.messages import UserError, user_path

TINY = "tiny"
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_KNOWN = read_json_object(Path(__file__).with_suffix(".json"), kind="the presets of the package")


def _config(like: str, sizes: Sequence[int], **changes: Any) -> dict[str, Any]:
    return {**_KNOWN["families"][like], **changes, **dict(zip(SIZES, sizes, strict=True))}


PRESETS = {name: _config(**model) for name, model in _KNOWN["models"].items()}


def small_llama(vocab_size: int, *sizes: int) -> dict[str, Any]:
    """Return the config.json of a LLaMA 2 with another vocabulary and other SIZES, for checks and measurements."""
    return _config("llama2", sizes, vocab_size=vocab_size)


def is_preset(name: str) -> bool:
    """Return whether --model NAME is a preset and not a folder with the same name."""
    try:
        return name in PRESETS and not user_path(name).is_dir()
    except UserError:  # the name cannot be a path
        return False
