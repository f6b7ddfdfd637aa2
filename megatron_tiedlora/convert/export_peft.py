"""Exports the exact PEFT LoRA adapter: A' = diag(u) A, B' = (alpha / r) diag(v) B, split into the rows of q, k and v
(and of gate and up), which share A'.

diag(v) B diag(u) A is a rank-r LoRA per layer and linear, so the export is exact. PEFT's files cannot express the tie,
so the native ones travel along.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.base.shapes import BlockShape, ModelShape
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, copy_adapter_files
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.inputs import EXPORT_RECORD, NATIVE_FOLDER, check_base

# The values that vLLM accepts for --max-lora-rank, the maximum rank that it serves (default 16).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def peft_tensors(source: ModelSource, adapter: NativeAdapter, *, rank: int) -> dict[str, torch.Tensor]:
    """The fp32 tensors of the PEFT file by name: lora_A (rank, d), lora_B (rows, rank), zero-padded to `rank`."""
    pad = rank - adapter.config.rank
    tensors = {}
    for rule, a, b in adapter.updates(source.shape):
        a = torch.nn.functional.pad(a, (0, 0, 0, pad))
        b = torch.nn.functional.pad(b, (0, pad))
        for hf_name, rows in rule.by_stored_tensor(b).items():
            module = f"base_model.model.{hf_name.removesuffix('.weight')}"
            # safetensors rejects tensors that share storage, and the parts of a fused linear share A'
            tensors[f"{module}.lora_A.weight"] = a.clone()
            tensors[f"{module}.lora_B.weight"] = rows.contiguous().clone()
    return tensors


def peft_base(source: ModelSource) -> str:
    """The absolute folder or hub id from which PEFT loads the base."""
    return source.name if source.from_hub or source.folder is None else str(source.folder.resolve())


def target_modules(block: BlockShape, linears: Iterable[str]) -> list[str]:
    """PEFT's names for linears of `block.adaptable`: the last part of each stored module's name."""
    modules = (rows.module.rpartition(".")[2] for name in linears for rows in block.adaptable[name].sources)
    return list(dict.fromkeys(modules))


def peft_config(source: ModelSource, adapter: NativeAdapter, *, rank: int) -> dict[str, Any]:
    """The fields of PEFT's adapter_config.json; lora_alpha equals r, so PEFT scales by 1."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": peft_base(source),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_modules(source.shape.block, [target.name for target in adapter.config.targets]),
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    if len(adapter.config.layers) < source.shape.num_layers:
        config["layers_to_transform"] = [layer - 1 for layer in adapter.config.layers]
        config["layers_pattern"] = "layers"
    return config


def export_peft(
    source: ModelSource,
    adapter: NativeAdapter,
    output: Path,
    *,
    native: Path | None = None,
    pad_rank_to: int | None = None,
    base_differs: bool = False,
    say: Callable[[str], object] = str,
    new: Callable[[Path], AbstractContextManager[Path]] = new_output,
) -> int:
    """Write a PEFT adapter folder atomically, and return its rank.

    Args:
        native: the folder from which `adapter` was read. Its two files travel along in `NATIVE_FOLDER`, and an import
            finds them there, with the tie that PEFT's files cannot express.
        base_differs: export for this base although the adapter was trained on another; the record says so.
        say: called with each note about the base.
        new: makes the output folder.

    Raises:
        UserError: the adapter is for another base, the padded rank is below the adapter's, the output exists, a factor
            is not finite (the message names it), or the files in `native` have changed.
    """
    rank = adapter.config.rank if pad_rank_to is None else pad_rank_to
    if rank < adapter.config.rank:
        raise UserError(f"--pad_rank_to {rank} is less than the adapter's rank {adapter.config.rank}; raise it")
    reject_existing(output, flag=f"--output {output}")
    base = check_base(source, adapter, uses_tokenizer=False, differs=base_differs)
    for note in base.notes:
        say(note)
    with new(output) as temporary:
        tensors = peft_tensors(source, adapter, rank=rank)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(f"--adapter: {name} of its export holds numbers that are not finite")
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", peft_config(source, adapter, rank=rank))
        write_json(temporary / EXPORT_RECORD, {**adapter.record(), **base.record})
        if native is not None:
            (temporary / NATIVE_FOLDER).mkdir()
            copy_adapter_files(native, temporary / NATIVE_FOLDER, adapter)
    return rank


def serve_hint(output: Path, base: str, rank: int, shape: ModelShape) -> str:
    """How to serve the exported adapter with vLLM, and what to do if vLLM does not accept its rank or its model."""
    if shape.final_norm.bias_name is not None:  # StableLM
        return "vLLM serves this model without adapters; serve the merged model instead"
    fitting = min((known for known in VLLM_RANKS if known >= rank), default=None)
    if fitting is None:
        return f"vLLM accepts ranks up to {VLLM_RANKS[-1]}; serve the merged model instead"
    flags = ["--enable-lora", "--lora-modules", f"tied={output}", "--max-lora-rank", str(fitting)]
    return f"serve with: {shlex.join(['vllm', 'serve', base, *flags])}"
