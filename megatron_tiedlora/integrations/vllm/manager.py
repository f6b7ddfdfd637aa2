"""vLLM's managers of adapters, for native adapters and VeRA: expanded to LoRA at load, or in tied slots."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.lora import utils
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.utils.torch_utils import PIN_MEMORY

from megatron_tiedlora.base.messages import UserError, bytes_in_words, count_text
from megatron_tiedlora.checkpoint.base_identity import model_source
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.export_peft import target_modules
from megatron_tiedlora.integrations.vllm import factors
from megatron_tiedlora.integrations.vllm.cpu import CpuTokens
from megatron_tiedlora.integrations.vllm.factors import ServedAdapter, TargetFactors
from megatron_tiedlora.integrations.vllm.layers import TiedLayer, tied_class
from megatron_tiedlora.integrations.vllm.slots import LinearSlots

logger = init_logger(f"vllm.{__name__}")  # vLLM shows only what its own loggers write


def serving_mode(vllm_config: Any) -> bool | str:
    """Return whether the server has tied slots, or "both" if it also has vLLM's own, from --additional-config. Raise
    ValueError for another value."""
    given = vllm_config.additional_config
    value = given.get("tied_lora", False) if isinstance(given, dict) else False
    if not isinstance(value, bool) and value != "both":
        raise ValueError(f'--additional-config: tied_lora = {value!r} is unknown; give true, false or "both"')
    return value


def _source_of(vllm_config: Any) -> ModelSource:
    model = vllm_config.model_config
    return model_source(model.hf_config, model.model)


class TiedLoRAModel(LoRAModel):
    """An adapter in tied slots. It has no plain LoRA, unless it stands for any adapter in a warm-up.

    Attributes:
        shards: the factors on this rank, by the names of `LinearSlots`.
    """

    shards: Mapping[str, TargetFactors] = {}


class TiedWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """Loads native adapters and VeRA in addition to what vLLM loads."""

    def __init__(self, vllm_config: Any, *args: Any, **options: Any) -> None:
        super().__init__(vllm_config, *args, **options)
        self._vllm_config, self._mode = vllm_config, serving_mode(vllm_config)
        if self._mode:
            self._manager_cls = TiedLoRAModelManager

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        folder, only_tied = Path(get_adapter_absolute_path(lora_request.lora_path)), self._mode is True
        if folder.is_dir() and (only_tied or not factors.is_plain_lora(folder)):
            source, limit = _source_of(self._vllm_config), self.lora_config.max_lora_rank
            served = factors.read_served(folder, source)
            factors.check_served(folder, served, source, max_rank=limit, only_tied=only_tied)
            if served is not None:
                return self._loaded(served, folder, lora_request.lora_int_id)
        return super()._load_adapter(lora_request)

    def _loaded(self, served: ServedAdapter, folder: Path, adapter_id: int) -> LoRAModel:
        manager, tied, rank = self._adapter_manager, served.tied if self._mode else None, served.adapter.config.rank
        tensors = served.lora_tensors() if tied is None else {}
        names = {*target_modules(served.source.shape.block, tied or ()), *(name.split(".")[-3] for name in tensors)}
        parts = (part for fused in manager.packed_modules.values() for part in fused)
        own = (name for name in manager.modules if tied is not None or name not in manager.packed_modules)
        here = {name.rpartition(".")[2] for name in (*own, *parts)}
        if missing := sorted(names - here):
            said = f"{folder}: adapts {', '.join(missing)}, for which the server has no slots; serve the merged model"
            raise UserError(f"{said}, or start it with --lora-target-modules {' '.join(sorted(names | here))}")
        if tied is not None:
            return manager.tied_model(adapter_id, rank, tied)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        # Until vLLM 0.28 the method has the second name.
        renames = getattr(mapper, "get_rename_mapper", None) or getattr(mapper, "get_unstacked_mapper", None)
        helper = PEFTHelper(r=rank, lora_alpha=rank, target_modules=sorted(names))
        options = {"device": "cpu", "dtype": self.lora_config.lora_dtype, "model_vocab_size": self.vocab_size}
        return LoRAModel.from_lora_tensors(adapter_id, tensors, helper, weights_mapper=renames and renames(), **options)


class TiedLoRAModelManager(LRUCacheLoRAModelManager):
    """Holds tied adapters in their own slots: one A and B per linear and slot, u and v per layer and slot.

    With "both", vLLM's own slots exist too. A slot number then has a tied and a plain slot, one of which is zero. Each
    kind of adapter has its own mapping of tokens to slots, in which the other kind's tokens use the base.
    """

    linears: dict[str, LinearSlots]
    supported_lora_modules: list[str]

    def __init__(self, *, vllm_config: Any, **options: Any) -> None:
        self._keeps_plain, self._source = serving_mode(vllm_config) == "both", _source_of(vllm_config)
        device, config = options["device"].type, options["lora_config"]
        refused = {
            "--fully-sharded-loras": config.fully_sharded_loras,
            "float32 on a GPU, for which vLLM has no LoRA": device == "cuda" and config.lora_dtype == torch.float32,
            "VLLM_LORA_ENABLE_DUAL_STREAM=1": envs.VLLM_LORA_ENABLE_DUAL_STREAM,
            f"a device of type {device}": device not in ("cpu", "cuda"),
            # Their graphs have one group of tokens for each adapter, and none for tokens of the base beside them.
            "the CUDA graphs of --specialize-active-lora": device == "cuda" and config.specialize_active_lora,
        }
        for name in (name for name, is_set in refused.items() if is_set):
            raise ValueError(f"tied_lora does not work with {name}; start the server without one of them")
        super().__init__(vllm_config=vllm_config, **options)
        self._check_linears()
        size = bytes_in_words(sum(linear.bytes_per_slot for linear in self.linears.values()))
        logger.info("tied adapters: %s of %s on this rank", count_text(self.lora_slots, "slot"), size)

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        self._wrapper = self.punica_wrapper_mapping.get(DEFAULT_LANGUAGE_WRAPPER_KEY)
        if self._wrapper is None:
            raise ValueError("tied_lora: this multimodal model has no tied slots in vLLM; start the server without it")
        if self._keeps_plain:  # vLLM's own slots have a wrapper of their own
            super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        if self.device.type == "cpu":
            self.tokens: Any = CpuTokens(self._wrapper, max_num_batched_tokens, self.lora_slots)
        else:
            from megatron_tiedlora.integrations.vllm.kernels import GpuTokens

            self.tokens = GpuTokens(self._wrapper)

    def _create_lora_modules(self) -> None:
        if not self._keeps_plain and self.lora_config.target_modules is None:  # no slots for the embedding and the head
            others = self.model.embedding_modules
            self.supported_lora_modules = [name for name in self.supported_lora_modules if name not in others]
        classes, num_slots = utils._all_lora_classes, self.lora_config.max_loras
        utils._all_lora_classes = tuple(tied_class(kind, self._keeps_plain) for kind in classes)
        try:
            if self._keeps_plain and self.device.type == "cpu":
                # vLLM adds the last of its slots to tokens without an adapter (vLLM's issue 48421).
                self.lora_config.max_loras += 1
            super()._create_lora_modules()
        finally:
            utils._all_lora_classes, self.lora_config.max_loras = classes, num_slots
        self.linears = {linear.name: linear for linear in self._group_linears()}

    def _group_linears(self) -> Iterator[LinearSlots]:
        """Yield the slots of each linear that an adapter may change."""
        groups: dict[str, dict[int, TiedLayer]] = {}
        for module_name, layer in self.modules.items():
            index, _, name = module_name.rpartition("layers.")[2].partition(".")
            if isinstance(layer, TiedLayer) and index.isdigit():
                if int(index) in groups.setdefault(name, {}):
                    raise ValueError(f"tied_lora: {module_name} is the second {name} of its layer; start without it")
                groups[name][int(index)] = layer
        for name, layers in groups.items():
            folder, _, last = name.rpartition(".")
            modules = {f"{folder}.{part}" for part in (last, *self.packed_modules_mapping.get(last, ()))}
            for target, linear in self._source.shape.block.adaptable.items():
                if covered := [block for block, rows in enumerate(linear.sources) if rows.module in modules]:
                    yield LinearSlots(name, layers, self.tokens, target, linear.blocks, covered, self.lora_config)

    def create_dummy_lora(self, lora_id: int, rank: int, embedding_modules: Any = None) -> LoRAModel:
        """Return an adapter of zeros for a warm-up. It uses the slots of both kinds."""
        loras = super().create_dummy_lora(lora_id, rank, embedding_modules).loras if self._keeps_plain else {}
        return TiedLoRAModel(lora_id, rank, loras)

    def tied_model(self, lora_id: int, rank: int, tied: Mapping[str, TargetFactors]) -> TiedLoRAModel:
        """Return an adapter with its factors on this rank. Raise UserError if its sizes are not the served model's."""
        model, pins = TiedLoRAModel(lora_id, rank, {}), PIN_MEMORY and self.device.type != "cpu"
        adapted = {name: linear for name, linear in self.linears.items() if linear.target in tied}
        model.shards = {name: linear.cut(tied[linear.target], pins) for name, linear in adapted.items()}
        return model

    def _create_merged_loras_inplace(self, lora_model: LoRAModel) -> None:
        if lora_model.loras:  # vLLM expects at least one
            super()._create_merged_loras_inplace(lora_model)

    def activate_adapter(self, lora_id: int) -> bool:
        """Copy an adapter into its slots, unless it is there. Return whether it was copied."""
        activated = bool(super().activate_adapter(lora_id))
        if activated:
            self._last_mapping = None  # an adapter of the other kind may have had this number
            shards = getattr(self._registered_adapters.cache[lora_id], "shards", {})
            for name, linear in self.linears.items():
                linear.set(self.lora_index_to_id.index(lora_id), shards.get(name))
        return activated

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        if self._keeps_plain:
            models = [self._registered_adapters.cache[one] for one in self.lora_index_to_id if one is not None]
            of_tied = _only(mapping, {model.id for model in models if isinstance(model, TiedLoRAModel)})
            self._wrapper.update_metadata(of_tied, self.lora_index_to_id, self.lora_slots + 1, self.vocab_size)
            mapping = _only(mapping, {model.id for model in models if model.loras})
        super()._set_adapter_mapping(mapping)
        self.tokens.prepare()

    def _check_linears(self) -> None:
        """Raise RuntimeError if one layer of a linear differs from plain PyTorch, for a random adapter or the base."""
        draw = torch.Generator().manual_seed(0)
        self.add_adapter(TiedLoRAModel(1, self.lora_config.max_lora_rank, {}))
        self.activate_adapter(1)  # in slot 0
        ids = 1, 0, 1, 1, 0, 1, 0
        adapted = torch.tensor(ids) > 0
        self._set_adapter_mapping(LoRAMapping(ids, ids[: self.max_num_seqs]))
        for name, linear in self.linears.items():
            shard = TargetFactors(*(torch.randn(part.shape, generator=draw).to(part.dtype) for part in linear.part(0)))
            for slot in (0, self.lora_slots - 1):  # a wrong index of the base's tokens means the last one
                linear.set(slot, shard)
            a, b, u, v = (part.float() for part in shard)
            x, y = (torch.randn(len(ids), size, generator=draw).to(shard.b.dtype) for size in (len(a.T), len(b)))
            of_rows = b * u[0].repeat_interleave(torch.tensor(linear.slices), dim=0)
            expected = y.float() + x.float() @ a.T @ of_rows.T * v[0]
            found = linear.first._apply_lora_to_output(x.to(self.device), y.to(self.device)).cpu()
            for slot in (0, self.lora_slots - 1):
                linear.set(slot, None)
            error = (found.float() - expected)[adapted].abs().max() / expected[adapted].abs().max()
            # GPUs multiply fp32 in tf32.
            limit = max(4 * torch.finfo(x.dtype).eps, 1e-5 if self.device.type == "cpu" else 2e-3)
            if not error <= limit or not torch.equal(found[~adapted], y[~adapted]):
                said = f"differs from PyTorch's by {error:.1e} of the largest value, or the base's output changed"
                raise RuntimeError(f"tied_lora: the update of {name} {said}; start the server without tied_lora")
        self.remove_all_adapters()


def _only(mapping: LoRAMapping, ids: set[int]) -> LoRAMapping:
    """Return a mapping in which the tokens of all other adapters use the base."""
    both = {"index_mapping": mapping.index_mapping, "prompt_mapping": mapping.prompt_mapping}
    return replace(mapping, **{name: tuple(one if one in ids else 0 for one in each) for name, each in both.items()})
