"""Reads the settings of a NeMo 1 GPT model. Each setting that would change the computation is checked by name.

Settings of training, kernels and precision change no result beyond rounding, so they are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.yaml_files import LARGEST_YAML, parse_yaml_mapping
from megatron_tiedlora.convert.nemo_archive import NemoArchive

CONFIG_MEMBER, WEIGHTS_MEMBER = "model_config.yaml", "model_weights.ckpt"
ROPE_BASE = 10_000.0  # it stands in NeMo's code; later versions have it as a setting too
_LARGEST_SIZE, _MOST_LAYERS, _MOST_RANKS = 2**28, 4096, 256
_ABSENT = object()
_SISTER = re.compile(r"\$\{\.(\w+)\}")
_CONVERTERS = "NeMo's own scripts/checkpoint_converters convert those"
# Settings whose absence means something else in NeMo.
_NEEDED: Mapping[str, Any] = {
    "normalization": "layernorm1p",
    "activation": "fast-swiglu",
    "position_embedding_type": "rope",
    "bias": False,
    "share_embeddings_and_output_weights": False,
}
# The only values of settings that may also be absent.
_OFF = (False, None)
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "transformer_block_type": ("pre_ln",),
    "attention_type": ("multihead",),
    "normalize_attention_scores": (True,),
    "pre_process": (True,),
    "post_process": (True,),
    "rotary_base": (ROPE_BASE,),
    "num_moe_experts": (1, None),
    "megatron_legacy": _OFF,  # another order of QKV's rows
    **dict.fromkeys(("headscale", "openai_gelu", "use_emha", "transformer_engine", "apply_embedding_scaling"), _OFF),
    **dict.fromkeys(("rotary_interleaved", "qk_layernorm", "multi_query_attention"), _OFF),
    **dict.fromkeys(("seq_len_interpolation_factor", "window_size", "virtual_pipeline_model_parallel_size"), (None,)),
}


@dataclass(frozen=True)
class NemoModel:
    """The settings of a model that is computed as Hugging Face's StableLM.

    Attributes:
        rotary_share: the share of each head that is rotated.
        tokenizer: the SentencePiece model's file in the archive.
    """

    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    norm_eps: float
    rotary_share: float
    max_positions: int
    tp_size: int
    pp_size: int
    tokenizer: str

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """How much of a head is rotated."""
        return int(self.head_dim * self.rotary_share)

    def rank_member(self, pp_rank: int, tp_rank: int) -> str:
        """The file in the archive that holds a rank's tensors."""
        if self.pp_size > 1:
            return f"tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:03d}/{WEIGHTS_MEMBER}"
        return f"mp_rank_{tp_rank:02d}/{WEIGHTS_MEMBER}" if self.tp_size > 1 else WEIGHTS_MEMBER

    def hf_config(self, *, vocab_size: int) -> dict[str, Any]:
        """The fields of a Hugging Face `config.json`, without the ids of special tokens and the dtype."""
        return {
            "architectures": ["StableLmForCausalLM"],
            "model_type": "stablelm",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "layer_norm_eps": self.norm_eps,
            "rope_theta": ROPE_BASE,
            "partial_rotary_factor": self.rotary_share,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
        }


def read_nemo_model(archive: NemoArchive) -> NemoModel:
    """The settings of an archive's model.

    Raises:
        UserError: a setting is missing, cannot be used, or computes something else; the message names it.
    """
    raw = archive.read(CONFIG_MEMBER, largest=LARGEST_YAML)
    source = f"{archive.path}: {CONFIG_MEMBER}"
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise UserError(f"{source}: not valid YAML (not UTF-8)") from None
    return nemo_model(parse_yaml_mapping(text, source=source), source=source)


def nemo_model(values: Mapping[str, Any], *, source: str) -> NemoModel:
    """The model of the settings `values`. Raises UserError as `read_nemo_model`; it names the `source`."""
    settings = _Settings(values, source)
    if settings.get("mcore_gpt", False) is not False:
        raise UserError(f"{source}: mcore_gpt is set, so it is a Megatron-Core model; {_CONVERTERS}")
    for name, wanted in _NEEDED.items():
        settings.must_be(name, wanted)
    for name, allowed in _ALLOWED.items():
        settings.must_be(name, *allowed, absent=allowed[0])
    heads = settings.size("num_attention_heads")
    model = NemoModel(
        num_layers=settings.size("num_layers", largest=_MOST_LAYERS),
        hidden_size=settings.size("hidden_size"),
        ffn_size=settings.size("ffn_hidden_size"),
        num_heads=heads,
        norm_eps=settings.fraction("layernorm_epsilon", 1e-5),
        rotary_share=settings.fraction("rotary_percentage", 1.0),
        max_positions=settings.size("max_position_embeddings"),
        tp_size=settings.size("tensor_model_parallel_size", 1, largest=_MOST_RANKS),
        pp_size=settings.size("pipeline_model_parallel_size", 1, largest=_MOST_RANKS),
        tokenizer=_tokenizer_member(settings),
    )
    settings.must_be("num_query_groups", heads, None, absent=None)
    settings.must_be("kv_channels", model.head_dim, None, absent=None)
    for name, size, parts in (
        ("hidden_size", model.hidden_size, heads),
        ("num_attention_heads", heads, model.tp_size),
        ("ffn_hidden_size", model.ffn_size, model.tp_size),
        ("num_layers", model.num_layers, model.pp_size),
        ("rotary_percentage", model.rotary_dim, 2),
    ):
        if size % parts or not size:
            settings.reject(name, f"{size} is not a multiple of {parts}")
    return model


def _tokenizer_member(settings: _Settings) -> str:
    """The member that holds the SentencePiece model. An archive may list it twice; the first one is used."""
    values = settings.get("tokenizer", {})
    tokenizer = _Settings(values if isinstance(values, dict) else {}, f"{settings.source}: tokenizer")
    tokenizer.must_be("library", "sentencepiece")
    tokenizer.must_be("sentencepiece_legacy", *_OFF, absent=False)  # the legacy wrapper adds tokens
    model = tokenizer.get("model", None) or tokenizer.get("tokenizer_model", None)
    if not isinstance(model, str) or not model.startswith("nemo:"):
        tokenizer.reject("model", "it does not name a file of the archive (nemo:NAME)")
    return str(model).removeprefix("nemo:")


class _Settings:
    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def get(self, name: str, absent: Any) -> Any:
        """A value; that of `${.other}` is the value of the other setting."""
        value = self._values.get(name, absent)
        if isinstance(value, str) and (sister := _SISTER.fullmatch(value)):
            value = self._values.get(sister[1])
        return value

    def reject(self, name: str, why: str) -> None:
        """Raise UserError with the value of a setting."""
        value = self.get(name, _ABSENT)
        given = "is absent, which" if value is _ABSENT else f"= {shown(value)}"
        raise UserError(f"{self.source}: {name} {given} cannot be converted: {why}")

    def must_be(self, name: str, *values: Any, absent: Any = _ABSENT) -> None:
        """Raise UserError unless a setting has one of `values`, the first of which is the usual one."""
        if self.get(name, absent) not in values:
            self.reject(name, f"only {shown(values[0])} is")

    def size(self, name: str, absent: int | None = None, *, largest: int = _LARGEST_SIZE) -> int:
        """A whole number from 1 to `largest`. Raises UserError."""
        value = self.get(name, absent)
        if type(value) is not int or not 1 <= value <= largest:
            self.reject(name, f"it is not a whole number from 1 to {largest}")
        return int(value)

    def fraction(self, name: str, absent: float) -> float:
        """A number above 0 and up to 1. Raises UserError."""
        value = self.get(name, absent)
        if isinstance(value, str) and re.fullmatch(r"\d+e-\d+", value):  # 1e-5, which YAML takes for text
            value = float(value)
        if type(value) not in (int, float) or not 0 < value <= 1:
            self.reject(name, "it is not a number above 0 and up to 1")
        return float(value)
