"""NeMo 1 files in the shape of GPT-2B-001, and a plain forward pass on their own tensors and orders of rows.

It shares no code with the converter: it writes as NeMo 1.17 does (tarfile, torch.save, one file for each rank), and
computes as NeMo does, with its names. `MISREADINGS` are ways to read the format wrong.
"""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

PREFIX = "model.language_model."
TOKENIZER = "2053796188904e679f7e2754a2a1f280_pieces.model"
MISREADINGS = ("qkv in blocks", "norms without one", "no norm biases", "gate and up swapped", "whole heads rotated")

# model_config.yaml of GPT-2B-001 as NeMo prints it, but for its training.
GPT_2B_001: dict[str, Any] = {
    "micro_batch_size": 1, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None, "encoder_seq_length": 4096,
    "max_position_embeddings": "${.encoder_seq_length}", "num_layers": 24, "hidden_size": 2048,
    "ffn_hidden_size": 5440, "num_attention_heads": 16, "init_method_std": 0.014, "hidden_dropout": 0.0,
    "kv_channels": None, "apply_query_key_layer_scaling": True, "normalization": "layernorm1p",
    "layernorm_epsilon": 1e-05, "make_vocab_size_divisible_by": 128, "pre_process": True, "post_process": True,
    "persist_layer_norm": True, "bias": False, "activation": "fast-swiglu", "headscale": False,
    "transformer_block_type": "pre_ln", "openai_gelu": False, "normalize_attention_scores": True,
    "position_embedding_type": "rope", "rotary_percentage": 0.5, "attention_type": "multihead",
    "share_embeddings_and_output_weights": False, "seq_len_interpolation_factor": None, "num_query_groups": None,
    "sequence_parallel": False, "fp32_residual_connection": False, "megatron_amp_O2": False,
    "transformer_engine": False, "fp8": False, "use_emha": False, "optim": {"name": "fused_adam", "betas": [0.9, 0.98]},
    "tokenizer": {
        "library": "sentencepiece", "type": None, "model": f"nemo:{TOKENIZER}", "vocab_file": None, "merge_file": None,
        "sentencepiece_legacy": False, "tokenizer_model": "nemo:a919114446344e349e73a0d807d9af98_pieces.model",
    },
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """A tiny model; `padded` rows of the vocabulary are in the file."""

    layers: int = 4
    hidden: int = 32
    ffn: int = 48
    heads: int = 4
    positions: int = 128
    padded: int = 512
    rotary: float = 0.5
    eps: float = 1e-2  # so that another one shows

    def settings(self, tp: int = 1, pp: int = 1, **changes: Any) -> dict[str, Any]:
        """The content of model_config.yaml."""
        return {
            **GPT_2B_001,
            **{"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "num_layers": self.layers},
            **{"hidden_size": self.hidden, "ffn_hidden_size": self.ffn, "num_attention_heads": self.heads},
            **{"encoder_seq_length": self.positions, "rotary_percentage": self.rotary, "layernorm_epsilon": self.eps},
            **changes,
        }


def require_exact_sentencepiece() -> None:
    """Skip a test that needs the ids of a SentencePiece model: transformers gives them from 5.24 on."""
    from transformers import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < (5, 24):
        pytest.skip("transformers before 5.24 gives other ids than SentencePiece")


@cache
def pieces(**options: Any) -> bytes:
    """A SentencePiece model with LLaMA's options, and a padding piece; fewer than 512 pieces."""
    require_exact_sentencepiece()
    import sentencepiece

    written = io.BytesIO()
    lines = [f"Question: Tom has {n} apples and buys {3 * n} more. the quick brown fox naïve café" for n in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=380, model_type="bpe", byte_fallback=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        bos_id=2, eos_id=3, pad_id=1, unk_id=0, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    return written.getvalue()


def draw_tensors(sizes: Sizes = Sizes(), *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a whole file by NeMo's names. Norms and biases are far from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn = sizes.hidden, sizes.ffn

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    found = {"embedding.word_embeddings.weight": draw(sizes.padded, hidden, scale=1.0)}
    rotated = int(hidden // sizes.heads * sizes.rotary)
    found["rotary_pos_emb.inv_freq"] = 1.0 / (10000 ** (torch.arange(0, rotated, 2).float() / rotated))
    norms = ["encoder.final_layernorm"]
    for number in range(sizes.layers):
        layer = f"encoder.layers.{number}"
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        found[f"{layer}.self_attention.query_key_value.weight"] = draw(3 * hidden, hidden, scale=2 * hidden**-0.5)
        found[f"{layer}.self_attention.dense.weight"] = draw(hidden, hidden, scale=hidden**-0.5)
        found[f"{layer}.mlp.dense_h_to_4h.weight"] = draw(2 * ffn, hidden, scale=hidden**-0.5)
        found[f"{layer}.mlp.dense_4h_to_h.weight"] = draw(hidden, ffn, scale=ffn**-0.5)
    for norm in norms:
        found |= {f"{norm}.weight": draw(hidden, scale=0.4), f"{norm}.bias": draw(hidden, scale=0.4)}
    found["output_layer.weight"] = draw(sizes.padded, hidden, scale=2 * hidden**-0.5)
    return found


def rank_tensors(
    tensors: dict[str, torch.Tensor], tp: int, pp: int, tp_rank: int, pp_rank: int, layers: int
) -> dict[str, torch.Tensor]:
    """What a rank of NeMo holds: its stage's layers numbered from 0, its rows or columns."""
    found, last = {}, pp - 1
    for name, tensor in tensors.items():
        stage = {"embedding": 0, "encoder": last, "output_layer": last, "rotary_pos_emb": pp_rank}[name.split(".")[0]]
        if name.startswith("encoder.layers."):
            number = int(name.split(".")[2])
            stage = number // (layers // pp)
            name = name.replace(f".layers.{number}.", f".layers.{number % (layers // pp)}.")
        if stage != pp_rank:
            continue
        if "dense_h_to_4h" in name:
            tensor = torch.cat([half.chunk(tp)[tp_rank] for half in tensor.chunk(2)])
        elif name.endswith(("dense.weight", "dense_4h_to_h.weight")):
            tensor = tensor.chunk(tp, dim=1)[tp_rank]
        elif tensor.dim() == 2:
            tensor = tensor.chunk(tp)[tp_rank]
        found[name] = tensor.clone()
    return found


def state_dict(tensors: dict[str, Any], prefix: str = PREFIX) -> OrderedDict[str, Any]:
    """As a module's own: an OrderedDict with versions in an attribute."""
    found = OrderedDict((prefix + name, tensor) for name, tensor in tensors.items())
    found._metadata = OrderedDict({"": {"version": 1}, "model": {"version": 1}})  # type: ignore[attr-defined]
    return found


def ckpt(content: Any) -> bytes:
    """What torch.save writes on a GPU."""
    written = io.BytesIO()
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save(content, written)
    return written.getvalue()


def rank_member(tp: int, pp: int, tp_rank: int, pp_rank: int) -> str:
    """NeMo's name of a rank's file."""
    folder = f"tp_rank_{tp_rank:02d}_pp_rank_{pp_rank:03d}/" if pp > 1 else f"mp_rank_{tp_rank:02d}/" if tp > 1 else ""
    return f"{folder}model_weights.ckpt"


def nemo_members(
    tensors: dict[str, torch.Tensor], sizes: Sizes = Sizes(), *, tp: int = 1, pp: int = 1, **changes: Any
) -> dict[str, bytes]:
    """The files of an archive by their names; `changes` of settings."""
    members = {"model_config.yaml": yaml.safe_dump(sizes.settings(tp, pp, **changes), sort_keys=False).encode()}
    for pp_rank in range(pp):
        for tp_rank in range(tp):
            mine = rank_tensors(tensors, tp, pp, tp_rank, pp_rank, sizes.layers)
            members[rank_member(tp, pp, tp_rank, pp_rank)] = ckpt(state_dict(mine))
    return {**members, TOKENIZER: pieces()}


def write_nemo(path: Path, members: dict[str, bytes], *, mode: Any = "w:", names: str = "./{}") -> Path:
    """Pack the files."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(names.format(name))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# The plain forward pass -------------------------------------------------------------------------------------------


def _norm(x: torch.Tensor, tensors: dict[str, torch.Tensor], name: str, wrong: str, eps: float) -> torch.Tensor:
    weight, bias = (tensors[f"{name}.{part}"] for part in ("weight", "bias"))
    weight = weight if wrong == "norms without one" else weight + 1
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * weight + (0 if wrong == "no norm biases" else bias)


def _rotate(x: torch.Tensor, share: float) -> torch.Tensor:
    """x: (rows, length, heads, head); the first `share` of a head is rotated, half against half."""
    dim = int(x.shape[-1] * share)
    angles = torch.outer(torch.arange(x.shape[1]).float(), 10000 ** (-torch.arange(0, dim, 2).float() / dim))
    turned, left = x[..., :dim], x[..., dim:]
    cos, sin = (torch.cat([f(angles), f(angles)], dim=-1)[:, None] for f in (torch.cos, torch.sin))
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, left], dim=-1)


def nemo_logits(
    tensors: dict[str, torch.Tensor], tokens: torch.Tensor, sizes: Sizes = Sizes(), *, wrong: str = ""
) -> torch.Tensor:
    """Logits (rows, length, padded vocabulary) of a whole file's tensors; `wrong` is one of `MISREADINGS`."""
    hidden = tensors["embedding.word_embeddings.weight"][tokens]
    rows, length = tokens.shape
    heads = (rows, length, sizes.heads)
    masked = torch.ones(length, length, dtype=torch.bool).triu(1)
    for number in range(sizes.layers):
        layer = {key.split(".", 3)[3]: t for key, t in tensors.items() if key.startswith(f"encoder.layers.{number}.")}
        fused = (
            _norm(hidden, layer, "input_layernorm", wrong, sizes.eps) @ layer["self_attention.query_key_value.weight"].T
        )
        if wrong == "qkv in blocks":
            q, k, v = (part.reshape(*heads, -1) for part in fused.chunk(3, dim=-1))
        else:
            q, k, v = fused.view(*heads, -1).chunk(3, dim=-1)
        q, k = (_rotate(part, 1.0 if wrong == "whole heads rotated" else sizes.rotary) for part in (q, k))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(masked, float("-inf")).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(rows, length, -1)
        hidden = hidden + attended @ layer["self_attention.dense.weight"].T
        fused = _norm(hidden, layer, "post_attention_layernorm", wrong, sizes.eps) @ layer["mlp.dense_h_to_4h.weight"].T
        gate, up = fused.chunk(2, dim=-1)
        if wrong == "gate and up swapped":
            gate, up = up, gate
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ layer["mlp.dense_4h_to_h.weight"].T
    return _norm(hidden, tensors, "encoder.final_layernorm", wrong, sizes.eps) @ tensors["output_layer.weight"].T
