"""Implements Tied-LoRA as a method of PEFT: its config, the model with the adapters, and the adapted linear modules.

A config is saved as the adapter_config.json of an adapter folder of this package. Each adapter is a `TiedAdapter`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

from megatron_tiedlora.adapters import tied_adapter
from megatron_tiedlora.base import files
from megatron_tiedlora.base.installation import __version__
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.methods import FACTORS, METHOD_NAMES, find_method
from megatron_tiedlora.base.shapes import QKV, TARGET_NAMES, ModelShape
from megatron_tiedlora.checkpoint import load_model, native_adapter
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity, check_same_base, identify_in_memory, model_source
from megatron_tiedlora.checkpoint.tensor_files import check_finite, check_tensors
from megatron_tiedlora.config.fields import TARGETS_HELP, parse_targets

# Fields with the same name in `TiedLoraConfig` and the adapter record; fields of the record that only PEFT uses.
_SAME_NAMES = ("method", "alpha", "layers", "targets", "seed", "init_std_a", "init_std_b")
_FOR_PEFT = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode")


@dataclass
class TiedLoraConfig(PeftConfig):
    """The PEFT config of a Tied-LoRA, VeRA or LoRA adapter, with the method names of the Tied-LoRA paper.

    Missing values are filled in when PEFT adds the adapter to a model.

    Attributes:
        base: the identity of the adapter's base model, as fields of `BaseIdentity`.
        unchecked: the folder of this config, if its weights file did not exist yet when the config was read; else None.
    """

    method: str = field(default="tl6", metadata={"help": f"method of the paper: {', '.join(METHOD_NAMES)}"})
    r: int = field(default=8, metadata={"help": "rank of A and B"})
    alpha: float | None = field(default=None, metadata={"help": "the update is scaled by alpha / r (default: r)"})
    layers: list[int] | None = field(default=None, metadata={"help": "adapted layers, 1-based (default: all)"})
    targets: list[str] | str = field(default=QKV, metadata={"help": TARGETS_HELP})
    seed: int = field(default=1234, metadata={"help": "seed of the initial values"})
    init_std_a: float | None = field(default=None, metadata={"help": "init std of A (default: depends on the method)"})
    init_std_b: float | None = field(default=None, metadata={"help": "init std of B (default: depends on the method)"})
    base: dict[str, Any] | None = field(default=None, metadata={"help": "identity of the base model; do not set it"})
    unchecked: str | None = field(default=None, metadata={"help": "set when PEFT downloads an adapter; do not set it"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(native_adapter.PEFT_TYPE)
        self.task_type = self.task_type or "CAUSAL_LM"
        self.target_modules: list[str] | None = None  # the full names of modules, once the model is known
        find_method(self.method)
        if type(self.r) is not int or self.r < 1:
            raise UserError(f"r = {shown(self.r)} is not a positive integer; give 1 or more")
        native_adapter.check_ranges(self)
        if type(self.seed) is not int or self.seed < 0:
            raise UserError(f"seed = {shown(self.seed)} is not a non-negative integer; give 0 or more")
        if self.task_type != "CAUSAL_LM":
            raise UserError(f"task_type {self.task_type} is not implemented; use CAUSAL_LM")
        try:
            self.targets = list(parse_targets(self.targets))
        except ValueError as error:
            raise UserError(str(error).removeprefix("--")) from None

    def __getattr__(self, name: str) -> Any:
        said = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name in ("trainable_token_indices", "modules_to_save"):  # TRL reads them after it has added tokens
            said = f"{name}: Tied-LoRA does not train embeddings; use a model and tokenizer that have the new tokens"
        raise AttributeError(said)

    def resolve(self, shape: ModelShape, base: BaseIdentity) -> tied_adapter.AdapterConfig:
        """Fill in missing values for a model, and return the adapter's config. Raises UserError on invalid values."""
        layers = list(range(1, shape.num_layers + 1) if self.layers is None else self.layers)
        native_adapter.check_layers(layers, shape.num_layers)
        own: dict[str, Any] = {name: getattr(self, name) for name in ("seed", "alpha", "init_std_a", "init_std_b")}
        own |= {"rank": self.r, "layers": tuple(layers), "targets": tied_adapter.targets_of(shape, self.targets)}
        config = tied_adapter.make_adapter_config(self.method, **own)
        self.alpha, self.layers = config.alpha, layers
        self.init_std_a, self.init_std_b = config.init_std_a, config.init_std_b
        self.base = self.base or asdict(base)
        self.base_model_name_or_path = self.base_model_name_or_path or base.base_model
        return config

    def save_pretrained(self, save_directory: str, **_: Any) -> None:
        """Write adapter_config.json without the checksums of the weights."""
        if self.base is None or self.layers is None:
            raise UserError("layers and base model are not known yet; add the adapter to a model before saving")
        own = {name: getattr(self, name) for name in _SAME_NAMES}
        stored = native_adapter.StoredAdapter(**{**self.base, **own}, rank=self.r, qkv_layout="q|k|v")
        content = {**stored.fields(), "base_model_name_or_path": self.base_model_name_or_path, "version": __version__}
        files.write_json(Path(save_directory) / native_adapter.CONFIG_FILE, content)


def native_arguments(folder: Path) -> dict[str, Any]:
    """Return the `TiedLoraConfig` arguments for an adapter folder in this package's format.

    Raises:
        UserError: the folder's config is not valid, or a checksum does not match. The weights file may be missing.
    """
    config, base, sums = native_adapter.read_config(folder)
    content = native_adapter.StoredAdapter.of(config, base).fields()
    same = {name: content[name] for name in (*_SAME_NAMES, *_FOR_PEFT)}
    if is_there := (weights := folder / native_adapter.WEIGHTS_FILE).is_file():
        files.check_file(weights, sums)
    return {**same, "r": config.rank, "base": asdict(base), "unchecked": None if is_there else str(folder)}


class TiedLoraLinear(nn.Module, BaseTunerLayer):
    """A linear module that returns W x plus B' A' x of each active adapter. `load_model` defines A' and B'.

    The tensors of the adapters belong to the `TiedLoraModel`.

    Attributes:
        places: the weight of this module that an adapter changes, by the adapter's name.
    """

    adapter_layer_names = ("tied_lora_adapters",)

    def __init__(self, base_layer: nn.Module, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.places: dict[str, native_adapter.AdaptedTensor] = {}
        self.merged_adapters: list[str] = []
        self._shared = (adapters,)  # in a tuple, so that they are not this module's own parameters

    @property
    def tied_lora_adapters(self) -> nn.ModuleDict:
        """All adapters of the model, by name."""
        return self._shared[0]

    def forward(self, x: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        """Return the output of the base module plus the updates of the active adapters, in the output's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        z: torch.Tensor = self.base_layer(x, *args, **keywords)
        if self.disable_adapters or self.merged:
            return z
        for name in self.active_adapters:
            if name in self.places:
                z = load_model.with_update(z, x, self._adapter(name), self.places[name])
        return z

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the named adapters (default: all active adapters) to the weight.

        Args:
            safe_merge: raise UserError if the sum is not finite, and leave the weight unchanged.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.places:
                self._add(name, safe=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged updates from the weight. Rounding may change the last bits of the weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), sign=-1)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this module."""
        self.places.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _adapter(self, name: str) -> tied_adapter.TiedAdapter:
        return cast(tied_adapter.TiedAdapter, self.tied_lora_adapters[name])

    def _add(self, name: str, *, sign: int = 1, safe: bool = False) -> None:
        base: Any = self.get_base_layer()
        weight: torch.Tensor = base.weight.data
        merged = weight.clone() if safe else weight
        load_model.merge_(merged, self._adapter(name), self.places[name], sign=sign)
        if safe and not merged.isfinite().all():
            said = f"after merging, {self.places[name].stored} is not finite"
            raise UserError(f"adapter {name}: {said}; use fp32, or another adapter")
        weight.copy_(merged)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        # PEFT has set requires_grad of whole adapters, but the table of methods decides which tensors are trained.
        for adapter in map(self._adapter, self.tied_lora_adapters):
            for name, parameter in adapter.named_parameters():
                if not adapter.config.factor(name).trained:
                    parameter.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own method would also cast to the base's dtype, but adapters stay in fp32.
        adapter, base = self._adapter(adapter_name), self.get_base_layer()
        target = device or next(base.parameters()).device
        if not next(adapter.parameters()).is_meta and target.type != "meta":  # meta: an offloaded module
            adapter.to(target)


_NAMES = frozenset(f"{prefix}{factor}" for prefix in ("", *(f"{name}." for name in TARGET_NAMES)) for factor in FACTORS)


class TiedLoraModel(BaseTuner):
    """A transformers model with Tied-LoRA adapters.

    Attributes:
        tied_lora_adapters: the adapters by name. All modules that an adapter changes use the same tensors.
    """

    prefix = "tied_lora_"
    tuner_layer_cls = TiedLoraLinear
    uses_shared_state = True

    def train(self, mode: bool = True) -> "TiedLoraModel":
        """Switch to training, or to evaluation. Warn if trained factors are not in fp32 any more."""
        trained = (weight for weight in self.tied_lora_adapters.parameters() if mode and weight.requires_grad)
        if any(weight.dtype != torch.float32 for weight in trained):
            said = "the adapter is not in fp32 (TRL casts that of a quantised model), and small updates are lost; call"
            fix = "model.base_model.tied_lora_adapters.float() before training, unless DeepSpeed has copies in fp32"
            warnings.warn(f"{said} {fix}", stacklevel=2)
        return super().train(mode)

    def _pre_injection_hook(self, model: Any, config: Any, adapter_name: str) -> None:
        _reject_dispatch(model)
        self.tied_lora_adapters = nn.ModuleDict()
        self._source = model_source(model)
        self._found = identify_in_memory(model, self._source)  # before anything is merged into the model
        self._places: Mapping[str, native_adapter.AdaptedTensor] = {}

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **keywords: Any) -> None:
        """Add the adapter of `self.peft_config[adapter_name]` to the model.

        Raises:
            UserError: the adapter does not fit the model, or the adapter's name is also the name of a tensor.
        """
        if adapter_name in {*TARGET_NAMES, *FACTORS}:
            raise UserError(f"adapter name {adapter_name!r} is a tensor's name; choose a different name")
        config: Any = self.peft_config[adapter_name]
        adapter, self._places = self._new_adapter(config)
        trained_before = [(weight, weight.requires_grad) for weight in self.tied_lora_adapters.parameters()]
        self.tied_lora_adapters[adapter_name] = adapter
        config.target_modules = list(self._places)
        try:
            super().inject_adapter(model, adapter_name, *args, **keywords)
        except Exception:
            del self.tied_lora_adapters[adapter_name]
            raise
        for weight, trained in trained_before:  # PEFT has changed requires_grad of the active adapter
            weight.requires_grad_(trained)
        if adapter_name not in self.active_adapters:
            adapter.requires_grad_(False)

    def _new_adapter(
        self, config: TiedLoraConfig
    ) -> tuple[tied_adapter.TiedAdapter, Mapping[str, native_adapter.AdaptedTensor]]:
        """Return a new adapter with the initial values of its config, and the weights that it changes, by module."""
        if config.base:
            trained = BaseIdentity(**config.base)
            for note in check_same_base(trained, self._found, source="the adapter", differs=True, in_memory=True):
                warnings.warn(note, stacklevel=4)
        described = config.resolve(self._source.shape, self._found)
        adapter = tied_adapter.TiedAdapter(tied_adapter.AdapterShard.whole(described))
        if not any(weight.is_meta for weight in adapter.parameters()):  # meta with low_cpu_mem_usage
            adapter.load_full()
        return adapter, load_model.find_places(self._source.shape, described)

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str,
        *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        if not isinstance(target, TiedLoraLinear):
            layer = TiedLoraLinear(target, self.tied_lora_adapters).train(target.training)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.places[adapter_name] = self._places[current_key]
        target._move_adapter_to_device_of_base_layer(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    @classmethod
    def _adapter_of(cls, model: Any, adapter_name: str) -> tied_adapter.TiedAdapter:
        tuner = model if isinstance(model, cls) else model.base_model
        return cast(tied_adapter.TiedAdapter, tuner.tied_lora_adapters[adapter_name])

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Mapping[str, Any], unwanted_adapter_names: Any = ()
    ) -> dict[str, torch.Tensor]:
        """Return the tensors A, B, u and v of an adapter in fp32, as they are saved."""
        described = cls._adapter_of(model, adapter_name).config
        prefix = f"tied_lora_adapters.{adapter_name}."
        held = {key.rpartition(prefix)[2]: value for key, value in state_dict.items() if prefix in key}
        for name in described.tensors:
            if name not in held:
                if tied_adapter.AdapterShard.whole(described).exists(name):
                    raise UserError(f"adapter {adapter_name}: the state dict has no tensor {name}; pass all tensors")
                held[name] = torch.ones(described.shape(name))
        return {name: held[name].float() for name in described.tensors}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        kept: str = key if key in _NAMES else super()._remove_adapter_name_from_key(key, adapter_name)
        return kept

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return an adapter's loaded tensors by their parameter names in the model.

        Raises:
            UserError: a tensor is missing or unknown, has a wrong shape, or has invalid values.
        """
        if config.unchecked is not None:  # by now the weights are in the hub's cache, next to the config
            native_arguments(Path(config.unchecked))  # compares them with their checksum
            config.unchecked = None
        adapter = cls._adapter_of(model, adapter_name)
        described, source = adapter.config, f"adapter {adapter_name}"
        found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        wanted = {name: described.shape(name) for name in described.tensors}
        check_tensors(source, found, wanted)
        for name, tensor in state_dict.items():
            check_finite(source, name, tensor)
        native_adapter.check_values(described, state_dict, source=source)
        start = "" if isinstance(model, cls) else "base_model."
        held = (name for name, _ in adapter.named_parameters())
        return {f"{start}tied_lora_adapters.{adapter_name}.{name}": state_dict[name] for name in held}


def _reject_dispatch(model: nn.Module) -> None:
    """Raise UserError if PEFT is about to dispatch a partly offloaded model over devices again.

    In this case, PEFT's `from_pretrained` has removed accelerate's hooks and would also offload the adapter's tensors.
    No hook would load these tensors again, because they do not belong to a module that is called.
    """
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    offloads = "disk" in devices or ("cpu" in devices and len(devices) > 1)
    if offloads and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UserError(
            "PEFT cannot load a Tied-LoRA adapter on a model that is partly offloaded (device_map); load the model"
            " again and use megatron_tiedlora.attach, or load the adapter's export (tiedlora export)"
        )
