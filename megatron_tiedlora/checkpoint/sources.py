"""Find the base model of --model: a folder on disk, the demo model, a Hub id, or a preset shape without weights."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import UserError, first_line, user_path
from megatron_tiedlora.base.output_folder import user_cache
from megatron_tiedlora.base.presets import PRESETS, is_preset
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.data.readers import may_be_hub_id
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.hf_config import StoredFormat, format_in_use, read_hf_config, stored_format

# Names of the RoPE scalings in hashes.
_SCALINGS = {shapes.LinearScaling: "linear", shapes.YarnScaling: "yarn", shapes.LongRopeScaling: "longrope"}
_SIDE_FILES = ["*.json", "tokenizer.model", "*.jinja", "README.md"]  # the last has the licence


@dataclass(frozen=True)
class ModelSource:
    """A base model.

    Attributes:
        name: the value that the user gave to --model.
        folder: the Hugging Face folder, or None for a preset shape.
        from_hub: whether `name` is a Hub id. `folder` is then in the Hub's cache.
        stored: the storage format of the blocks' linears if they are quantised in the folder, else None.
    """

    name: str
    folder: Path | None
    shape: ModelShape
    from_hub: bool = False
    stored: StoredFormat | None = None

    @property
    def base_hash(self) -> str:
        """Return a hash of the config's fields that determine the computation.

        The hash is stored with every adapter and checkpoint, so it must never change. Fields keep their first names. A
        field that was added later is hashed only if its value differs from the value that all earlier models have. So
        windows are not hashed: they were not when rows longer than a window were rejected.
        """
        shape, block = self.shape, self.shape.block
        same_names = "vocab_size", "hidden_size", "intermediate_size", "num_layers", "max_positions", "tied_embeddings"
        fields: dict[str, Any] = {
            **{name: getattr(shape, name) for name in same_names},
            "num_heads": shape.heads.num,
            "num_kv_heads": shape.heads.num_kv,
            "head_dim": shape.heads.dim,
            "norm_eps": shape.final_norm.eps,
            "rope": _hashed_rope(shape.heads.rope),
            "attention_bias": block.qkv.bias,
        }
        if block.output.bias != block.qkv.bias:
            fields["output_bias"] = block.output.bias
        if shape.final_norm.bias_name is not None:
            fields["norm"] = "layer"
        if norms := shape.heads.norms:
            fields["head_norms"] = "together" if norms[0].sharded else True
        names = [part.name for part in block.parts if isinstance(part, shapes.NormShape) and part not in norms]
        if names != ["attention.qkv.norm", "mlp.gate_up.norm"]:
            fields["norms"] = names
        by_block = {block: kind.rope for block, kind in enumerate(shape.kinds, start=1)}
        if unrotated := [block for block, rope in by_block.items() if rope is None]:
            fields["unrotated"] = unrotated
        usual = None, shape.heads.rope
        later: dict[str, tuple[Any, Any]] = {
            "norm_offset": (shape.final_norm.offset, 0.0),
            "score_multiplier": (shape.heads.multiplier, None),
            "score_cap": (shape.heads.cap, None),
            "activation": (block.activation, "silu"),
            "residual_multiplier": (block.multiplier, 1.0),
            "embedding_multiplier": (shape.embedding_multiplier, 1.0),
            "logit_divisor": (shape.logit_divisor, 1.0),
            "logit_cap": (shape.logit_cap, None),
        }
        if others := {block: _hashed_rope(rope) for block, rope in by_block.items() if rope and rope not in usual}:
            fields["other_ropes"] = others
        fields |= {name: value for name, (value, usual) in later.items() if value != usual}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def auto_class(self) -> str:
        """Return the name of the class of transformers that loads the model, with the other towers if it has any."""
        return f"AutoModelFor{'ImageTextToText' if self.shape.block.is_tower else 'CausalLM'}"

    @property
    def attention_in_transformers(self) -> str:
        """Return the name of an attention of transformers that can run the model. Its "sdpa" does not cap scores."""
        return "sdpa" if self.shape.heads.cap is None else "eager"

    @property
    def stored_base(self) -> str | None:
        """Return the storage format of the blocks' linears in the folder, a key of `BASE_FORMATS`, or None."""
        return None if self.stored is None else self.stored.base_format

    def base_format(self, given: str | None, products: str | None = None) -> str | None:
        """Return the storage format of the blocks' linears in a run (see `format_in_use`)."""
        return format_in_use(self.stored, given, products, source=self.name)

    def check_length(self, flag: str, length: int) -> None:
        """Raise UserError if `length`, the value of `flag` in tokens, is too long for the model."""
        limit = self.shape.limit
        if length > limit.tokens:
            raise UserError(f"{flag} {length}: {self.name} {limit.reason}. Give at most {limit.tokens}")

    def weights_folder(self) -> Path:
        """Return the folder with the weights and the tokenizer. Raise UserError if the model is a preset."""
        if self.folder is None:
            raise UserError(
                f"--model {self.name} is a shape without weights, for --dry_run and benchmarks; give a Hugging Face"
                " folder or a Hub id, or write random weights with `tiedlora random-model`"
            )
        return self.folder


def _hashed_rope(rope: shapes.RopeShape) -> dict[str, Any]:
    """Return the fields of a rotary embedding that `base_hash` includes. The first five fields are always included."""
    fields: dict[str, Any] = {
        "theta": rope.theta,
        "factor": None,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_positions": 8192,
    }
    if isinstance(rope.scaling, shapes.Llama3Scaling):
        fields |= asdict(rope.scaling)
    elif rope.scaling is not None:
        fields["scaling"] = {"kind": _SCALINGS[type(rope.scaling)], **asdict(rope.scaling)}
    if rope.share != 1:
        fields["share"] = rope.share
    if rope.interleaved:
        fields["interleaved"] = True
    return fields


def find_model(name: str, *, weights: bool = True) -> ModelSource:
    """Return the base model of --model. A Hub id is downloaded once into the Hub's cache. Raise UserError if the model
    does not exist, if its config cannot be read, or if it has a feature that is not implemented."""
    if is_preset(name):
        return ModelSource(name, None, shape_from_hf(PRESETS[name], source=name))
    local = local_folder(name)
    if (folder := local) is None:
        from huggingface_hub import snapshot_download

        files = [*_SIDE_FILES, *(["*.safetensors"] if weights else [])]
        try:
            # Some of Mistral's repositories have all weights a second time, in other names.
            folder = Path(snapshot_download(name, allow_patterns=files, ignore_patterns=["consolidated*"]))
        except Exception as error:  # the Hub's client raises many types; each means that the model cannot be found
            said = f"--model {name}: no such folder, and it cannot be downloaded from the Hub ({first_line(error)})"
            raise UserError(f"{said}; check the name and the network") from None
    values = read_hf_config(folder)
    stored = stored_format(values, source=str(folder / "config.json"))
    return ModelSource(name, folder, read_shape(folder, values), from_hub=local is None, stored=stored)


def read_shape(folder: Path, values: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the model in `folder`, whose config has the fields `values` (see `shape_from_hf`)."""
    names: Collection[str] = ()
    if {"text_config", "vision_config"} & values.keys():  # only a text tower has different names in some folders
        from megatron_tiedlora.checkpoint.tensor_files import stored_names  # imports torch

        names = stored_names(folder)
    return shape_from_hf(values, source=str(folder / "config.json"), names=names)


def demo_model_path() -> Path:
    """Return the folder of the demo model, which `tiedlora prepare-demo` writes. It may not exist yet."""
    return user_cache() / "demo_model"


def local_folder(name: str) -> Path | None:
    """Return the folder that --model names, or None for a Hub id. Raise UserError if `name` is neither."""
    folder = demo_model_path() if name == "demo" else user_path(name)
    if folder.is_dir():
        return folder
    if name == "demo":
        raise UserError(f"{folder}: the demo model does not exist; run `tiedlora prepare-demo` (make train does this)")
    if folder.exists():
        raise UserError(f"--model {name} is a file; give the folder with config.json and the safetensors files")
    if "/" not in name or not may_be_hub_id(name):
        raise UserError(f"--model {name}: no such folder; give a folder, a Hub id, or a preset")
    return None
