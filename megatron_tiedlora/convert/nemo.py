"""Converts a NeMo 1 model such as GPT-2B-001 from its `.nemo` file to a Hugging Face folder, some rows at a time.

The architecture is Hugging Face's StableLM. Its LayerNorms have a bias, its linears do not, RoPE rotates a part of each
head, and the MLP is SwiGLU. This module knows NeMo's settings, tensor names and row orders. A layer has H heads on T
tensor-parallel ranks, and [a; b] means that the rows of b follow the rows of a:

    query_key_value   rank t holds heads t H/T .. (t + 1) H/T, each as rows [q; k; v]
    dense_h_to_4h     rank t holds [gate_t; up_t], and gate = [gate_1; ..; gate_T]
    dense, dense_4h_to_h    rank t holds columns; norms are on every rank, with weight - 1 in the file
    word_embeddings, output_layer    rank t holds rows, and rows beyond the vocabulary are padding
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from megatron_tiedlora.base import files, output_folder
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.checkpoint.tensor_files import StreamedTensor, all_finite, check_tensors, sharded, write_files
from megatron_tiedlora.convert.nemo_archive import NemoArchive, readable
from megatron_tiedlora.data.tokenizer import LARGEST_TOKENIZER, check_conversion

# Texts for which transformers must return the same token ids as SentencePiece.
_PROBES = ("Answer: 42", " 12,345.60", "  two\n\nlines\t", "naïve 日本語 😀", "a   b ")
_BLOCK_ROWS = 256  # rows of a tensor that are written at a time
_EMBEDDING, _HEAD, _FINAL_NORM = "embedding.word_embeddings.weight", "output_layer.weight", "encoder.final_layernorm"
_FREQUENCIES = "rotary_pos_emb.inv_freq"
_PREFIXES = ("model.language_model.", "model.module.language_model.")  # the second one with megatron_amp_O2
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_LINEARS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
Rank = dict[str, torch.Tensor]


def convert_nemo(nemo: Path, output: Path, *, take_over: bool = False) -> dict[str, Any]:
    """Write the model of the file `nemo` as a `stablelm` folder atomically, and return its config.

    Weights keep their dtype, but norms are fp32. Padding rows beyond the tokenizer's vocabulary are left out.

    Raises:
        UserError: the archive is broken or malicious, its model cannot be a StableLM, or the output exists.
    """
    output_folder.reject_existing(output, flag=f"--output {output}")
    archive, source = NemoArchive(nemo), f"{nemo}: {CONFIG_MEMBER}"
    with readable(nemo, f"{CONFIG_MEMBER}: not valid YAML"):
        text = archive.read(CONFIG_MEMBER, largest=files.LARGEST_YAML).decode()
    model = nemo_model(files.parse_yaml(text, dict, source=source), source=source)
    tokenizer_file = model.tokenizer.model.removeprefix("nemo:")
    sentencepiece = archive.read(tokenizer_file, largest=LARGEST_TOKENIZER)
    check_conversion(nemo)
    with readable(nemo, f"{tokenizer_file} cannot be read as a SentencePiece model"):
        vocab_size, ids, settings = _read_tokenizer(sentencepiece)
    with output_folder.new_output(output, take_over=take_over) as temporary:
        tensors = stablelm_tensors(archive, model, temporary, vocab_size=vocab_size)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        config = {**model.hf_config(vocab_size=vocab_size), **ids, "dtype": dtype}
        (temporary / "tokenizer.model").write_bytes(sentencepiece)
        files.write_json(temporary / "tokenizer_config.json", settings)
        files.write_json(temporary / "config.json", config)
        write_files(temporary, sharded(tensors))
    return config


def _read_tokenizer(raw: bytes) -> tuple[int, dict[str, int | None], dict[str, Any]]:
    """Return a SentencePiece model's vocabulary size, its special ids, and the content of its `tokenizer_config.json`.

    The special ids are fields of `config.json`. With `tokenizer_config.json`, transformers encodes like SentencePiece.

    Raises:
        ValueError: transformers returns different token ids from SentencePiece.
        Exception: any error that the libraries raise.
    """
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    processor = sentencepiece.SentencePieceProcessor(model_proto=raw)
    found = {role: getattr(processor, f"{role}_id")() for role in ("bos", "eos", "unk", "pad")}
    roles = {role: token for role, token in found.items() if token >= 0}  # -1: the model has no such token
    # The class that reads SentencePiece files unchanged; as in SentencePiece, "</s>" in a text is plain text.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    settings |= {f"{role}_token": processor.id_to_piece(token) for role, token in roles.items()}
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "tokenizer.model").write_bytes(raw)
        files.write_json(Path(scratch, "tokenizer_config.json"), settings)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(scratch)
    for text in _PROBES:
        if tokenizer.encode(text, add_special_tokens=False) != processor.encode(text):
            raise ValueError(f"transformers returns different ids for {shown(text)}")
    ids = {f"{role}_token_id": roles.get(role) for role in ("bos", "eos", "pad")}
    return processor.get_piece_size(), ids, settings


def stablelm_tensors(archive: NemoArchive, model: NemoModel, folder: Path, *, vocab_size: int) -> list[StreamedTensor]:
    """Return the tensors of a `StableLmForCausalLM` in the order of its layers. Norms are fp32; others are as stored.

    A value that is not finite raises UserError when it is written.

    Args:
        folder: the folder for copies of the ranks' files; see `NemoArchive.tensors`.

    Raises:
        UserError: a rank's file is missing or unknown, or a tensor is missing, unknown, or has a wrong shape or dtype.
    """
    _check_members(archive, model)
    stages = [
        [_read_rank(archive, model, folder, pp_rank, tp_rank) for tp_rank in range(model.tp_size)]
        for pp_rank in range(model.pp_size)
    ]
    for name, stage in ((_EMBEDDING, stages[0]), (_HEAD, stages[-1])):
        if (stored := sum(len(rank[name]) for rank in stage)) < vocab_size:
            said = f"{name} has {stored} rows, but the tokenizer has {vocab_size} pieces"
            raise UserError(f"{archive.path}: {said}; download the file again")
    dtypes = {tensor.dtype for stage in stages for rank in stage for tensor in rank.values() if tensor.dim() == 2}
    if len(dtypes) > 1:
        listed = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"{archive.path}: its weights are {listed}; they must have one dtype")
    return [_finite(tensor, str(archive.path)) for tensor in _tensors(stages, model, vocab_size)]


def _check_members(archive: NemoArchive, model: NemoModel) -> None:
    """Raise UserError unless the archive holds exactly one file of weights for every rank."""
    wanted = {
        model.rank_member(pp_rank, tp_rank) for pp_rank in range(model.pp_size) for tp_rank in range(model.tp_size)
    }
    for name in archive.members:
        if name.startswith("model_weights/"):
            raise UserError(f"{archive.path}: holds a distributed checkpoint (model_weights/), which is not supported")
        if name.endswith(WEIGHTS_MEMBER) and name not in wanted:
            size = f"tensor_model_parallel_size {model.tp_size} and pipeline_model_parallel_size {model.pp_size}"
            raise UserError(f"{archive.path}: holds {shown(name)}, which does not belong to {size}")
    for name in sorted(wanted - archive.members.keys()):
        raise UserError(f"{archive.path}: {name} is missing; download the file again")


def _read_rank(archive: NemoArchive, model: NemoModel, folder: Path, pp_rank: int, tp_rank: int) -> Rank:
    """Return the tensors of a rank by their NeMo names without the prefix. Raise UserError if their shapes or the
    rotary frequencies do not match the settings."""
    member = model.rank_member(pp_rank, tp_rank)
    found: Rank = {}
    for name, tensor in archive.tensors(member, folder).items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            hint = " (Megatron-Core's name)" if name.startswith(("model.decoder.", "model.embedding.")) else ""
            raise UserError(f"{archive.path}: {member} holds {shown(name)}{hint}, which is not supported")
        found[name.removeprefix(prefix)] = tensor
    where = f"{archive.path}: {member}"
    if (frequencies := found.pop(_FREQUENCIES, None)) is not None:
        half = model.rotary_dim // 2
        # Frequencies have 16 bits with megatron_amp_O2. `half` is from untrusted settings: check the shape first.
        fits = frequencies.shape == (half,)
        if not fits or not torch.allclose(frequencies.float(), ROPE_BASE ** (-torch.arange(half) / half), rtol=1e-2):
            said = f"{where}: {_FREQUENCIES} does not match base {ROPE_BASE:g} and {2 * half} rotated elements"
            raise UserError(said)
    stored = {name: tuple(tensor.shape) for name, tensor in found.items()}
    check_tensors(where, stored, _expected_shapes(model, pp_rank, stored))
    return found


def _expected_shapes(
    model: NemoModel, pp_rank: int, stored: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a rank's tensors. The number of vocabulary rows, with padding, is read from `stored`."""
    hidden, ffn, ranks = model.hidden_size, model.ffn_size, model.tp_size
    embedding, head = ((*stored.get(name, ())[:1], hidden) for name in (_EMBEDDING, _HEAD))
    sizes = (3 * hidden // ranks, hidden), (hidden, hidden // ranks), (2 * ffn // ranks, hidden), (hidden, ffn // ranks)
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: embedding} if pp_rank == 0 else {}
    for number in range(model.num_layers // model.pp_size):
        layer = f"encoder.layers.{number}"
        shapes |= {f"{layer}.{norm}.{part}": (hidden,) for norm in _LAYER_NORMS for part in ("weight", "bias")}
        shapes |= {f"{layer}.{name}.weight": size for name, size in zip(_LINEARS, sizes, strict=True)}
    if pp_rank == model.pp_size - 1:
        shapes |= {f"{_FINAL_NORM}.weight": (hidden,), f"{_FINAL_NORM}.bias": (hidden,), _HEAD: head}
    return shapes


def _tensors(stages: Sequence[Sequence[Rank]], model: NemoModel, vocab_size: int) -> Iterator[StreamedTensor]:
    yield _joined("model.embed_tokens.weight", _first_rows([rank[_EMBEDDING] for rank in stages[0]], vocab_size))
    for number in range(model.num_layers):
        stage, local = divmod(number, model.num_layers // model.pp_size)  # a stage numbers its layers from 0
        ranks, theirs, ours = stages[stage], f"encoder.layers.{local}", f"model.layers.{number}"
        for norm in _LAYER_NORMS:
            yield from _norm(f"{ours}.{norm}", ranks[0], f"{theirs}.{norm}")
        fused, output, gate_up, down = ([rank[f"{theirs}.{name}.weight"] for rank in ranks] for name in _LINEARS)
        heads = [head for part in fused for head in part.view(-1, 3, model.head_dim, model.hidden_size)]
        for index, name in enumerate("qkv"):
            yield _joined(f"{ours}.self_attn.{name}_proj.weight", [head[index] for head in heads])
        yield _joined(f"{ours}.self_attn.o_proj.weight", output, dim=1)
        halves = [both.chunk(2) for both in gate_up]
        yield _joined(f"{ours}.mlp.gate_proj.weight", [gate for gate, _ in halves])
        yield _joined(f"{ours}.mlp.up_proj.weight", [up for _, up in halves])
        yield _joined(f"{ours}.mlp.down_proj.weight", down, dim=1)
    yield from _norm("model.norm", stages[-1][0], _FINAL_NORM)
    yield _joined("lm_head.weight", _first_rows([rank[_HEAD] for rank in stages[-1]], vocab_size))


def _finite(tensor: StreamedTensor, source: str) -> StreamedTensor:
    """Return the tensor with an added check, which raises UserError for a value that is not finite."""

    def blocks() -> Iterator[torch.Tensor]:
        for block in tensor.blocks():
            if not all_finite(block):
                raise UserError(f"{source}: {tensor.name} has values that are not finite; the file is broken")
            yield block

    return replace(tensor, blocks=blocks)


def _norm(name: str, rank: Rank, theirs: str) -> Iterator[StreamedTensor]:
    """Yield the weight and the bias of a norm. NeMo computes with weight + 1 in fp32."""
    weight, bias = (rank[f"{theirs}.{part}"].float() for part in ("weight", "bias"))
    yield _joined(f"{name}.weight", [weight + 1])
    yield _joined(f"{name}.bias", [bias])


def _first_rows(parts: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    starts = accumulate(map(len, parts), initial=0)
    return [part[: max(count - start, 0)] for part, start in zip(parts, starts, strict=False)]


def _joined(name: str, parts: Sequence[torch.Tensor], *, dim: int = 0) -> StreamedTensor:
    """Return a tensor called `name` that concatenates `parts` along the rows (0) or the columns (1)."""
    shape = tuple(torch.cat([part.to("meta") for part in parts], dim).shape)
    blocks = [part.split(_BLOCK_ROWS) for part in parts]  # `split` copies no values
    rows = list(zip(*blocks, strict=True)) if dim else [(block,) for part in blocks for block in part]
    return StreamedTensor(name, parts[0].dtype, shape, lambda: (torch.cat(row, dim) for row in rows))


# The settings of a NeMo 1 model ---------------------------------------------------------------------------------------


CONFIG_MEMBER, WEIGHTS_MEMBER = "model_config.yaml", "model_weights.ckpt"
ROPE_BASE = 10_000.0  # a constant in NeMo's code; later versions also have a setting for it
_SISTER = re.compile(r"\$\{\.(\w+)\}")
_SMALL = re.compile(r"\d+e-\d+")  # such as 1e-5, which YAML reads as text
_CONVERTERS = "convert it with NeMo's own scripts/checkpoint_converters"
_Size = Annotated[int, Field(strict=True, ge=1, le=2**28)]
_LayerCount = Annotated[int, Field(strict=True, ge=1, le=4096)]
_Ranks = Annotated[int, Field(strict=True, ge=1, le=256)]
_PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
_Off = Literal[False] | None


class NemoTokenizer(BaseModel):
    """The settings of a supported tokenizer.

    Attributes:
        sentencepiece_legacy: must be off, because the legacy wrapper adds tokens.
        model: nemo:NAME, where NAME is the file of the SentencePiece model in the archive.
    """

    library: Literal["sentencepiece"]
    sentencepiece_legacy: _Off = None
    model: Annotated[str, Field(strict=True, pattern="^nemo:")]


class NemoModel(BaseModel):
    """The settings of a NeMo model that Hugging Face's StableLM can compute.

    Each setting that would change the computation is a field with NeMo's name. Settings of training, kernels and
    precision change results only by rounding, so they are ignored.

    Attributes:
        rotary_share: the fraction of each head that is rotated.
        megatron_legacy: must be off, because it changes the order of QKV's rows.
    """

    num_layers: _LayerCount
    hidden_size: _Size
    ffn_size: _Size = Field(alias="ffn_hidden_size")
    num_heads: _Size = Field(alias="num_attention_heads")
    norm_eps: _PositiveShare = Field(1e-5, alias="layernorm_epsilon")
    rotary_share: _PositiveShare = Field(1.0, alias="rotary_percentage")
    max_positions: _Size = Field(alias="max_position_embeddings")
    tp_size: _Ranks = Field(1, alias="tensor_model_parallel_size")
    pp_size: _Ranks = Field(1, alias="pipeline_model_parallel_size")
    num_query_groups: Any = None
    kv_channels: Any = None
    tokenizer: NemoTokenizer
    # These settings must be present, because NeMo's defaults differ.
    normalization: Literal["layernorm1p"]
    activation: Literal["fast-swiglu"]
    position_embedding_type: Literal["rope"]
    bias: Literal[False]
    share_embeddings_and_output_weights: Literal[False]
    # These settings may also be absent.
    transformer_block_type: Literal["pre_ln"] = "pre_ln"
    attention_type: Literal["multihead"] = "multihead"
    normalize_attention_scores: Literal[True] = True
    pre_process: Literal[True] = True
    post_process: Literal[True] = True
    rotary_base: Annotated[float, Field(ge=ROPE_BASE, le=ROPE_BASE)] = ROPE_BASE
    num_moe_experts: Literal[1, None] = None
    megatron_legacy: _Off = None
    headscale: _Off = None
    openai_gelu: _Off = None
    use_emha: _Off = None
    transformer_engine: _Off = None
    apply_embedding_scaling: _Off = None
    rotary_interleaved: _Off = None
    qk_layernorm: _Off = None
    multi_query_attention: _Off = None
    seq_len_interpolation_factor: None = None
    window_size: None = None
    virtual_pipeline_model_parallel_size: None = None

    @property
    def head_dim(self) -> int:
        """Return the number of elements in a head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Return the number of elements in a head that RoPE rotates."""
        return int(self.head_dim * self.rotary_share)

    def rank_member(self, pp_rank: int, tp_rank: int) -> str:
        """Return the name of the file in the archive that holds a rank's tensors."""
        if self.pp_size > 1:
            return f"tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:03d}/{WEIGHTS_MEMBER}"
        return f"mp_rank_{tp_rank:02d}/{WEIGHTS_MEMBER}" if self.tp_size > 1 else WEIGHTS_MEMBER

    def hf_config(self, *, vocab_size: int) -> dict[str, Any]:
        """Return the fields of a Hugging Face `config.json`, without the ids of special tokens and the dtype."""
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


def nemo_model(values: Mapping[str, Any], *, source: str) -> NemoModel:
    """Return the model settings in `values`, after checking them.

    Raises:
        UserError: a setting is missing, not supported, or changes the computation. The message names it and `source`.
    """
    settings = _resolved(values)
    if settings.get("mcore_gpt", False) is not False:
        raise UserError(f"{source}: mcore_gpt is set, so it is a Megatron-Core model; {_CONVERTERS}")
    if isinstance(named := settings.get("tokenizer"), dict):
        named = _resolved(named)  # `model` or `tokenizer_model` names the tokenizer's file
        settings["tokenizer"] = {**named, "model": named.get("model") or named.get("tokenizer_model")}
    try:
        model = NemoModel.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = "is absent, which" if first["type"] == "missing" else f"= {shown(first['input'])}"
        where, why = ": ".join(map(str, first["loc"])), first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{source}: {where} {given} cannot be converted: {why}") from None
    for name, size, parts in (
        ("hidden_size", model.hidden_size, model.num_heads),
        ("num_attention_heads", model.num_heads, model.tp_size),
        ("ffn_hidden_size", model.ffn_size, model.tp_size),
        ("num_layers", model.num_layers, model.pp_size),
        ("rotary_percentage", model.rotary_dim, 2),
    ):
        if size % parts or not size:
            why = f"{size} is not a multiple of {parts}"
            raise UserError(f"{source}: {name} = {shown(settings.get(name, 1.0))} cannot be converted: {why}")
    for name, wanted in (("num_query_groups", model.num_heads), ("kv_channels", model.head_dim)):
        if (found := getattr(model, name)) not in (None, wanted):
            raise UserError(f"{source}: {name} = {shown(found)} cannot be converted: only {wanted} is supported")
    return model


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with each `${.name}` replaced by that setting's value, and texts such as 1e-5 by numbers."""
    found = {}
    for name, value in values.items():
        sister = _SISTER.fullmatch(value) if isinstance(value, str) else None
        plain = value if sister is None else values.get(sister[1])
        found[name] = float(plain) if isinstance(plain, str) and _SMALL.fullmatch(plain) else plain
    return found
