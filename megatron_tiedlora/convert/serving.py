"""Returns the shell commands that serve adapters with vLLM and other programs, and counts the memory of a vLLM slot."""

import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from megatron_tiedlora.base.shapes import TARGET_NAMES, LinearShape, ModelShape
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.export_peft import Export, base_location, base_name

# The values that vLLM accepts for --max-lora-rank, the maximum rank that it serves (default 16).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LARGEST_BATCH = 8  # adapters in one batch of vLLM; each needs a slot of GPU memory


def why_no_lora(shape: ModelShape) -> str:
    """Return why vLLM has no adapters of this model: of all families here, StableLM alone; '' if vLLM has them."""
    return "vLLM has no LoRA for StableLM; serve the merged model instead" if shape.final_norm.bias_name else ""


def allowed_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank of vLLM for adapters of `rank`, or 0 if vLLM does not accept this rank."""
    return next((known for known in VLLM_RANKS if known >= rank), 0)


def slot_bytes(linears: Collection[LinearShape], rank: int, num_layers: int, *, tied: bool) -> int:
    """Return the bytes that a slot of vLLM for these linears takes without tensor parallelism: A, B and v in 16 bits
    and u in fp32. A tied slot has A and B once, and u for each fused module and v in every layer. vLLM's own slot has A
    for each fused module and B in every layer."""
    total = 0
    for linear in linears:
        a, b, fused = rank * linear.in_size, rank * linear.out_size, len({rows.module for rows in linear.sources})
        in_layer = 2 * linear.out_size + 4 * rank * fused if tied else 2 * (a * fused + b)
        total += num_layers * in_layer + (2 * (a + b) if tied else 0)
    return total


def vllm_words(base: str, targets: Collection[str], *, rank: int, slots: int = 1, cached: int = 1) -> list[str]:
    """Return the words of `vllm serve` with its LoRA flags, for adapters of the linears `targets` and `rank`, a value
    of `VLLM_RANKS`. `slots` adapters fit in one batch and `cached` in host memory; vLLM's default is 1."""
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
    # By default vLLM reserves memory for all linears, embedding and head.
    words += ["--lora-target-modules", *vllm_modules(targets)]
    return words + (["--max-loras", str(slots), "--max-cpu-loras", str(cached)] if max(slots, cached) > 1 else [])


def vllm_modules(targets: Collection[str]) -> list[str]:
    """Return vLLM's names of the linears `targets`. vLLM and this package fuse the same linears."""
    return [f"{name.removesuffix('_proj')}_proj" for name in TARGET_NAMES if name in targets]


def serve_command(base: str, adapters: Path) -> str:
    """Return the command that serves the adapters in the folder `adapters` by name, without an export."""
    return shlex.join(["tiedlora", "serve", "--model", base, "--adapters", str(adapters)])


def serve_hints(
    exports: Mapping[str, Export], source: ModelSource, *, named: str | None = None, adapters: Path | None = None
) -> list[str]:
    """Return the shell commands that serve adapters of one base, each after a comment that names the program. With
    several adapters, only the commands of vLLM are returned. `exports` has the adapters by their names in requests.
    `named` is the base's name in PEFT's config [`base_name`], and `adapters` the folder for `tiedlora serve`."""
    base, lines = base_location(source), [*_vllm(exports, source, named or base_name(source), adapters)]
    if len(exports) == 1:
        ((name, export),) = exports.items()
        gguf = f"{export.folder.name}.gguf"
        convert = ["python", "convert_lora_to_gguf.py", str(export.folder), "--base", base, "--outfile", gguf]
        # SGLang finds the adapter's rank and modules itself, and has no maximum rank.
        paths = ["--model-path", base, "--lora-paths", f"{name}={export.folder}"]
        lines += ["# serve with SGLang", shlex.join(["python", "-m", "sglang.launch_server", *paths])]
        lines += ["# serve with llama.cpp, in its folder", shlex.join(convert)]
        lines.append(f"llama-server -m BASE.gguf --lora {shlex.quote(gguf)}")
    return lines


def _vllm(exports: Mapping[str, Export], source: ModelSource, named: str, adapters: Path | None) -> Iterator[str]:
    served = {name: export for name, export in exports.items() if allowed_rank(export.rank)}
    if why := why_no_lora(source.shape):
        yield f"# {why}"
        return
    if left_out := ", ".join(name for name in exports if name not in served):
        yield f"# vLLM accepts ranks up to {VLLM_RANKS[-1]}; serve the merged model of {left_out} instead"
    if not served:
        return
    base, several = base_location(source), len(served) > 1
    if adapters is not None:
        yield "# serve by name with vLLM and this package's plugin, without exports"
        yield serve_command(base, adapters)
    flags = "; --max-loras: adapters in one batch, --max-cpu-loras: in host memory" if several else ""
    yield f"# serve with vLLM 0.26 or later{flags}"
    if named != base:
        yield f"# only for vLLM's filesystem resolver: the export names {named}; export with --base_name {base}"
    rank = allowed_rank(max(export.rank for export in served.values()))
    adapted = {target for export in served.values() for target in export.targets}
    words = vllm_words(base, adapted, rank=rank, slots=min(len(served), LARGEST_BATCH), cached=len(served))
    yield shlex.join([*words, "--lora-modules", *(f"{name}={export.folder}" for name, export in served.items())])
