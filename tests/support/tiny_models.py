"""Tiny checkpoints of LLaMA and the other families with a tokeniser, random adapters and random batches, for tests.

Checkpoints are written by transformers itself, so a reader is tested against the real format. Weights are drawn wide
enough that logits are far from uniform, attention is far from even, and norms and biases differ from 1 and 0: a dropped
bias, a wrong head order or a forgotten permutation shows in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from support.oracle import IGNORED_LABEL, OracleAdapter, OracleConfig
from support.oracle_adapter import ALL_TARGETS, TRAINED_TENSORS, Groups, first_axis, tensor_name
from support.oracle_training import OracleBatch

# Stretches some of the tiny heads' frequencies, blends some and leaves some.
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.3, 2.5],
    "long_factor": [2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
# One tiny model or more of each family: what `tiny_config` needs for it. A new family is one line here.
# Key-value heads are fewer than heads, and in the second model of a family as many. Windows are shorter than the rows
# of tests, caps are small enough to bend, and no multiplier is near 1.
_SCORES = {"query_pre_attn_scalar": 20}
_MULTIPLIERS = {
    "embedding_multiplier": 3.1,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.37,
    "logits_scaling": 1.7,
}
FAMILY_MODELS: dict[str, dict[str, Any]] = {
    "llama linear": {"rope": {"rope_type": "linear", "factor": 3.0}},
    "llama dynamic": {"rope": {"rope_type": "dynamic", "factor": 3.0}, "num_kv_heads": 4},
    "llama yarn": {"rope": YARN, "tied": True},
    "mistral": {"family": "mistral", "sliding_window": 7, "head_dim": 12},
    "mistral mha": {"family": "mistral", "sliding_window": None, "num_kv_heads": 4},
    "qwen2": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen2 mha": {"family": "qwen2", "num_kv_heads": 4, "tied": True, "rope": YARN},
    "qwen3": {"family": "qwen3", "head_dim": 12},
    "qwen3 mha": {"family": "qwen3", "num_kv_heads": 4, "head_dim": 16, "attention_bias": True, "rope": YARN}
    | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "phi3": {"family": "phi3", "original_max_position_embeddings": 64, "rope": LONGROPE},
    "phi3 mha": {"family": "phi3", "num_kv_heads": 4, "sliding_window": 8},
    "stablelm": {"family": "stablelm", "use_qkv_bias": True, "rope": {"partial_rotary_factor": 0.5}},
    "smollm3 mha": {"family": "smollm3", "no_rope_layer_interval": 3, "num_kv_heads": 4},
    "smollm3": {"family": "smollm3", "no_rope_layer_interval": 2, "tied": True}
    | {"use_sliding_window": True, "sliding_window": 5},
    "stablelm mha": {"family": "stablelm", "num_kv_heads": 4},
    "olmo2": {"family": "olmo2", "head_dim": 12},
    "olmo2 mha": {"family": "olmo2", "num_kv_heads": 4, "attention_bias": True, "rope": YARN},
    "olmo3": {"family": "olmo3", "head_dim": 12, "sliding_window": 6, "rope": YARN}
    | {"layer_kinds": ("sliding_attention", "full_attention")},
    "olmo3 mha": {"family": "olmo3", "num_kv_heads": 4, "sliding_window": 9, "layer_types": None, "tied": True},
    "gemma": {"family": "gemma", "hidden_size": 40, "head_dim": 12, "tied": True},
    "gemma mha": {"family": "gemma", "hidden_size": 40, "num_kv_heads": 4, "rope_theta": 500.0},
    "gemma2": {"family": "gemma2", "hidden_size": 40, "head_dim": 12, "sliding_window": 7, "tied": True}
    | {**_SCORES, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma2 mha": {"family": "gemma2", "hidden_size": 40, "num_kv_heads": 4, "sliding_window": 5}
    | {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": None},
    "gemma3_text": {"family": "gemma3_text", "hidden_size": 40, "head_dim": 12, "sliding_window": 6, "tied": True}
    | {**_SCORES, "layer_kinds": ("sliding_attention", "sliding_attention", "full_attention")}
    | {"rope": {"rope_type": "linear", "factor": 3.0}},
    "gemma3_text mha": {"family": "gemma3_text", "hidden_size": 40, "num_kv_heads": 4, "sliding_window": 9}
    | {**_SCORES, "layer_kinds": ("full_attention", "sliding_attention"), "final_logit_softcapping": 3.0},
    "gemma3": {"family": "gemma3", "hidden_size": 40, "head_dim": 12, "sliding_window": 6, "tied": True}
    | {**_SCORES, "layer_kinds": ("sliding_attention", "full_attention")},
    "granite": {"family": "granite", "head_dim": 12, **_MULTIPLIERS},
    "granite mha": {"family": "granite", "num_kv_heads": 4, "attention_bias": True, "tied": True, **_MULTIPLIERS},
    "glm": {"family": "glm", "head_dim": 12, "attention_bias": True, "rope": {"partial_rotary_factor": 0.5}},
    "glm4": {"family": "glm4", "head_dim": 12, "attention_bias": True, "rope": {"partial_rotary_factor": 0.5}},
    "glm4 mha": {"family": "glm4", "num_kv_heads": 4, "attention_bias": False, "tied": True},
    "ministral3": {"family": "ministral3", "head_dim": 12, "sliding_window": 7}
    | {"rope": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    "mistral3": {"family": "mistral3", "head_dim": 12, "sliding_window": None},
    "mistral3 mha": {"family": "mistral3", "num_kv_heads": 4, "sliding_window": 7, "tied": True},
    "mistral3 ministral3": {"family": "mistral3", "tower": "ministral3", "head_dim": 12, "sliding_window": 6}
    | {"rope": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
}
# Those that tests of training and of gradients choose by name, for what is theirs alone. All later ones come to all.
_CHOSEN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "stablelm", "smollm3", "olmo2", "olmo3")
LATER_FAMILIES = tuple(
    name for name, model in FAMILY_MODELS.items() if name == model.get("family") and name not in _CHOSEN
)
# The small vision tower of a multimodal model.
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 16,
    "patch_size": 4,
}
# Of each family of multimodal models: the family of its text tower, and the fields beside the two towers.
_MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("gemma3_text", {"vision_config": {"model_type": "siglip_vision_model", **_TOWER}}
               | {"mm_tokens_per_image": 4, "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 319}),
    "mistral3": ("mistral", {"vision_config": {"model_type": "pixtral", **_TOWER}}),
}  # fmt: skip
# The families in which rotations differ by kind of layer. The fields given are those of layers without a window.
_TWO_ROTATIONS = ("olmo3", "gemma3_text")
# The sizes of configs that leave all other fields to a family's defaults.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}
# Byte-level tokeniser: <unk>, <s>, </s>, then the 256 bytes.
UNK_ID, BOS_ID, EOS_ID, NUM_TOKENIZER_TOKENS = 0, 1, 2, 259


def tiny_config(
    *,
    family: str = "llama",
    hidden_size: int = 32,
    intermediate_size: int = 48,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int = 320,
    tied: bool = False,
    attention_bias: bool | None = None,
    rope_theta: float = 10000.0,
    llama3_rope: bool = False,
    max_positions: int = 256,
    norm_eps: float = 1e-5,
    layer_kinds: tuple[str, ...] = (),
    tower: str | None = None,
    **fields: Any,
) -> Any:
    """A transformers config of a family (a model type). `num_kv_heads = num_heads` is plain multi-head attention.

    Args:
        layer_kinds: the `layer_types` of the first layers, and again and again of those after them.
        tower: the family of a multimodal model's text tower, if it is not the usual one.
        fields: of the family's own config.
    """
    from transformers import AutoConfig

    text, outer = _MULTIMODAL.get(family, (family, {}))
    text = tower or text
    kind = {"rope_theta": rope_theta, **(LLAMA3_ROPE if llama3_rope else {"rope_type": "default"})}
    rope = {**kind, **fields.pop("rope", {})}
    if text in _TWO_ROTATIONS:
        rope = {"full_attention": rope, "sliding_attention": {"rope_theta": rope_theta / 2, "rope_type": "default"}}
    if layer_kinds:
        fields["layer_types"] = [layer_kinds[layer % len(layer_kinds)] for layer in range(num_layers)]
    values = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim or hidden_size // num_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        **({} if attention_bias is None else {"attention_bias": attention_bias}),
        "rope_parameters": rope,
        "max_position_embeddings": max_positions,
        "layer_norm_eps" if family == "stablelm" else "rms_norm_eps": norm_eps,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
        **fields,
    }
    if outer:
        values = {**outer, "text_config": {"model_type": text, **values}, "tie_word_embeddings": tied}
    config = AutoConfig.for_model(family, **values)
    config._attn_implementation = "eager"
    return config


def auto_class(config: Any) -> Any:
    """The class of transformers that loads the models of a config, with all of their towers."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def tiny_model(*, seed: int = 0, **shape: Any) -> Any:
    """A transformers model in fp32, in eval mode, with eager attention; `shape` as in `tiny_config`."""
    config = tiny_config(**shape)
    model = auto_class(config).from_config(config, attn_implementation="eager").eval()
    generator, gemma = torch.Generator().manual_seed(seed), config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                draw = 0.3 * draw
            elif "norm" in name:  # Gemma adds 1 to what it stores
                draw = 0.2 * draw if gemma else 1 + 0.2 * draw
            elif "embed_tokens" in name:  # also the head, where tied; Gemma multiplies by sqrt(d)
                draw = (0.15 if gemma else 0.6) * draw
            elif any(part in name for part in ("lm_head", "q_proj", "k_proj", "qkv_proj")):
                draw = 2.0 * draw / math.sqrt(parameter.shape[-1])
            else:
                draw = draw / math.sqrt(parameter.shape[-1])
            parameter.copy_(draw)
    return model


def write_tiny_model(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    tokenizer: bool = True,
    **shape: Any,
) -> Path:
    """Write config, safetensors and (vocabulary permitting) a tokeniser to `folder`, and return it.

    `max_shard_size`, e.g. "20KB", gives several shards with an index; `shape` as in `tiny_config`.
    """
    folder = Path(folder)
    model = tiny_model(seed=seed, **shape).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    if tokenizer:
        write_tiny_tokenizer(folder, vocab_size=model.config.get_text_config().vocab_size)
    return folder


def with_both_signs(folder: Path) -> Path:
    """Give the last norm of a Gemma model in `folder` weights of both signs, and return `folder`.

    Gemma's embeddings are scaled, and its head too: as it is, a tiny model says the same token for ever.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    noise = torch.randn(tensors["model.norm.weight"].shape, generator=torch.Generator().manual_seed(3))
    save_file(tensors | {"model.norm.weight": 1.5 * noise - 1}, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tiny_tokenizer(folder: str | Path, *, vocab_size: int = 320) -> Path:
    """A byte-level BPE without merges: one token a byte, any text round-trips. Like LLaMA's it puts <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    assert vocab_size >= NUM_TOKENIZER_TOKENS, f"the tiny tokeniser needs {NUM_TOKENIZER_TOKENS} ids, not {vocab_size}"
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(tokens) == NUM_TOKENIZER_TOKENS
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return Path(folder)


def random_adapter(
    method: str,
    config: OracleConfig,
    *,
    rank: int = 4,
    alpha: float | None = None,
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.5,
    targets: Collection[str] = ("qkv",),
    groups: Mapping[str, Groups] | None = None,
) -> OracleAdapter:
    """An adapter as if in the middle of training: no tensor is zero, and the update is about `scale` of its linears.

    Args:
        alpha: rank by default; give another value so that a forgotten alpha / r shows.
        layers: 1-based; all by default.
        targets: drawn in their own order, so that qkv has the same tensors with and without others.
        groups: of layers that share a factor, by its letter, where it is not as in the method.
    """
    layers = tuple(range(1, config.num_layers + 1)) if layers is None else tuple(layers)
    generator = torch.Generator().manual_seed(seed)
    lead = {letter: first_axis(letter, method, len(layers), groups or {}) for letter in "ABuv"}

    def vector(name: str, width: int) -> torch.Tensor:
        # Signs vary and no entry is near 0; drawn always, so that the seed means the same for every method.
        size = 0.5 + torch.rand(*lead[name], width, generator=generator, dtype=torch.float64)
        sign = torch.where(torch.rand(*lead[name], width, generator=generator) < 0.3, -1.0, 1.0)
        return size * sign if name in TRAINED_TENSORS[method] else torch.ones_like(size)

    tensors: dict[str, torch.Tensor] = {}
    targets = tuple(target for target in ALL_TARGETS if target in targets)
    for target in targets:
        d, o = config.target_columns(target), sum(config.target_rows(target))
        a = torch.randn(*lead["A"], rank, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
        b = torch.randn(*lead["B"], o, rank, generator=generator, dtype=torch.float64) * scale / math.sqrt(rank)
        factors = {"A": a, "B": b, "u": vector("u", rank), "v": vector("v", o)}
        tensors |= {tensor_name(target, name): factor for name, factor in factors.items()}
    alpha = float(rank) if alpha is None else float(alpha)
    return OracleAdapter(method, rank, alpha, layers, tensors, targets, groups or {}).cast(dtype)


def random_batches(
    num_steps: int, *, samples_per_step: int = 4, vocab_size: int = 320, seed: int = 0
) -> list[list[OracleBatch]]:
    """Per step, `samples_per_step` samples (each an OracleBatch of one sequence, each its own length).

    Supervised tokens differ on purpose: samples are, in turn, fully supervised, supervised at one token, not at all,
    and over their second half; a mean of means is then far from the mean over tokens. Labels are already shifted and
    the last position never has one.
    """
    generator = torch.Generator().manual_seed(seed)

    def sample(kind: int) -> OracleBatch:
        length = int(torch.randint(5, 25, (1,), generator=generator))
        tokens = torch.randint(EOS_ID + 1, vocab_size, (length,), generator=generator)
        tokens[0] = BOS_ID
        labels = torch.full((length,), IGNORED_LABEL)
        first = {0: 0, 1: length - 2, 2: length - 1, 3: length // 2}[kind]
        labels[first : length - 1] = tokens[first + 1 :]
        return OracleBatch(tokens[None], labels[None])

    return [[sample(kind % 4) for kind in range(samples_per_step)] for _ in range(num_steps)]


def pad_samples(samples: list[OracleBatch], *, multiple: int = 1) -> OracleBatch:
    """One batch of the samples (each (1, S)), padded on the right to a multiple, with its attention mask.

    Rows of `pack_samples` get one more document instead of a mask.
    """
    length = max(part.input_ids.shape[1] for part in samples)
    shape = (len(samples), -(-length // multiple) * multiple)
    input_ids, labels = torch.full(shape, EOS_ID), torch.full(shape, IGNORED_LABEL)
    mask, positions, documents = torch.zeros(3, *shape, dtype=torch.long)
    documents += 99
    inputs = None if samples[0].loss_inputs is None else torch.zeros(2, *shape, dtype=torch.float64)
    for row, part in enumerate(samples):
        width = part.input_ids.shape[1]
        input_ids[row, :width], labels[row, :width], mask[row, :width] = part.input_ids[0], part.labels[0], 1
        if part.positions is not None and part.documents is not None:
            positions[row, :width], documents[row, :width] = part.positions[0], part.documents[0]
        if inputs is not None:
            inputs[:, row, :width] = part.loss_inputs[:, 0]
    more: dict[str, Any] = {"objective": samples[0].objective, "loss_inputs": inputs}
    if samples[0].documents is None:
        return OracleBatch(input_ids, labels, attention_mask=mask, **more)
    return OracleBatch(input_ids, labels, positions=positions, documents=documents, **more)


def pack_samples(samples: list[OracleBatch]) -> OracleBatch:
    """One (1, S) row of all samples, with positions that restart and document ids."""
    lengths = [part.input_ids.shape[1] for part in samples]
    inputs = [part.loss_inputs for part in samples if part.loss_inputs is not None]
    return OracleBatch(
        torch.cat([part.input_ids for part in samples], dim=1),
        torch.cat([part.labels for part in samples], dim=1),
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        documents=torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None],
        objective=samples[0].objective,
        loss_inputs=torch.cat(inputs, dim=2) if inputs else None,
    )
