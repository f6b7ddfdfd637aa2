"""The configuration of Tied-LoRA in PEFT; saved, it is the adapter_config.json of a native adapter folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config, targets_of
from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.extras import __version__
from megatron_tiedlora.base.methods import METHOD_NAMES, find_method
from megatron_tiedlora.base.shapes import QKV, ModelShape
from megatron_tiedlora.base.text_files import check_file
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity
from megatron_tiedlora.checkpoint.native_adapter import (
    CONFIG_FILE,
    PEFT_TYPE,
    WEIGHTS_FILE,
    StoredAdapter,
    check_layers,
    check_ranges,
    read_config,
)
from megatron_tiedlora.config.fields import TARGETS_HELP, parse_targets

# Fields that have one name in PEFT's config and in ours, which has some for PEFT alone.
_SAME_NAMES = ("method", "alpha", "layers", "targets", "seed", "init_std_a", "init_std_b")
_FOR_PEFT = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode")


@dataclass
class TiedLoraConfig(PeftConfig):
    """Tied-LoRA, VeRA or LoRA by the paper's table of methods.

    PEFT fills in what is left out when it puts the adapter on a model.

    Attributes:
        base: fields of the model that the adapter belongs to.
        unchecked: the folder of this config, if its weights were not there yet when it was read.
    """

    method: str = field(default="tl6", metadata={"help": f"which of the paper's methods: {', '.join(METHOD_NAMES)}"})
    r: int = field(default=8, metadata={"help": "rank of A and B"})
    alpha: float | None = field(default=None, metadata={"help": "the update is scaled by alpha / r (default: r)"})
    layers: list[int] | None = field(default=None, metadata={"help": "adapted layers, 1-based (default: all)"})
    targets: list[str] | str = field(default=QKV, metadata={"help": TARGETS_HELP})
    seed: int = field(default=1234, metadata={"help": "seed of the initial values"})
    init_std_a: float | None = field(default=None, metadata={"help": "init std of A (default: by method)"})
    init_std_b: float | None = field(default=None, metadata={"help": "init std of B (default: by method)"})
    base: dict[str, Any] | None = field(default=None, metadata={"help": "fields of the base model; leave it out"})
    unchecked: str | None = field(default=None, metadata={"help": "set by PEFT's download; leave it out"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        self.task_type = self.task_type or "CAUSAL_LM"
        self.target_modules: list[str] | None = None  # the full names of modules, once the model is known
        find_method(self.method)
        if type(self.r) is not int or self.r < 1:
            raise UserError(f"r = {shown(self.r)} is not a positive integer")
        check_ranges(self)
        if type(self.seed) is not int or self.seed < 0:
            raise UserError(f"seed = {shown(self.seed)} is not an integer from 0 on")
        if self.task_type != "CAUSAL_LM":
            raise UserError(f"task_type {self.task_type} is not implemented; only CAUSAL_LM is")
        try:
            self.targets = list(parse_targets(self.targets))
        except ValueError as error:
            raise UserError(str(error).removeprefix("--")) from None

    def resolve(self, shape: ModelShape, base: BaseIdentity) -> AdapterConfig:
        """Fill in what was left out, for a model of this shape and identity. Raises UserError if they do not fit."""
        layers = list(range(1, shape.num_layers + 1) if self.layers is None else self.layers)
        check_layers(layers, shape.num_layers)
        config = make_adapter_config(
            self.method,
            rank=self.r,
            layers=tuple(layers),
            targets=targets_of(shape, self.targets),
            seed=self.seed,
            alpha=self.alpha,
            init_std_a=self.init_std_a,
            init_std_b=self.init_std_b,
        )
        self.alpha, self.layers = config.alpha, layers
        self.init_std_a, self.init_std_b = config.init_std_a, config.init_std_b
        self.base = self.base or asdict(base)
        self.base_model_name_or_path = self.base_model_name_or_path or base.base_model
        return config

    def save_pretrained(self, save_directory: str, **_: Any) -> None:
        """Write the adapter_config.json of a native folder, without checksums."""
        if self.base is None or self.layers is None:
            raise UserError("the adapter is on no model yet, so its layers and its base are not known")
        own = {name: getattr(self, name) for name in _SAME_NAMES}
        stored = StoredAdapter(**{**self.base, **own}, rank=self.r, qkv_layout="q|k|v")
        content = {**stored.fields(), "base_model_name_or_path": self.base_model_name_or_path, "version": __version__}
        write_json(Path(save_directory) / CONFIG_FILE, content)


def native_arguments(folder: Path) -> dict[str, Any]:
    """The arguments of `TiedLoraConfig` for a native adapter folder.

    Raises:
        UserError: its config is not valid, or a checksum does not match.
    """
    config, base, _ = read_config(folder)
    content = StoredAdapter.of(config, base).fields()
    same = {name: content[name] for name in (*_SAME_NAMES, *_FOR_PEFT)}
    unchecked = None if weights_match(folder) else str(folder)
    return {**same, "r": config.rank, "base": asdict(base), "unchecked": unchecked}


def weights_match(folder: Path) -> bool:
    """Compare the weights of a native folder with their checksum; False if they are not there.

    Raises:
        UserError: they differ, or the config is not valid.
    """
    weights, (*_, sums) = folder / WEIGHTS_FILE, read_config(folder)
    if not weights.is_file():
        return False
    check_file(weights, sums)
    return True
