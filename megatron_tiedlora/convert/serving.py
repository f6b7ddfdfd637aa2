"""How exported adapters are served: the commands of vLLM, SGLang and llama.cpp, as lines for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV, ModelShape

# The values that vLLM accepts for --max-lora-rank, the maximum rank that it serves (default 16).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_MODULES = {QKV: "qkv_proj", OUTPUT: "o_proj", GATE_UP: "gate_up_proj", DOWN: "down_proj"}  # its fused linears
_LARGEST_BATCH = 8  # adapters in one batch of vLLM: each takes a slot of GPU memory


class Export(NamedTuple):
    """An exported adapter: its folder and rank, and the names of the adapted linears."""

    folder: Path
    rank: int
    targets: Sequence[str]


def serve_hints(exports: Mapping[str, Export], base: str, shape: ModelShape, *, named: str | None = None) -> list[str]:
    """The commands that serve exported adapters of one base by name, each after a comment that names the program.

    SGLang and llama.cpp are left out if there are several.

    Args:
        exports: by the name of the adapter in requests.
        base: hub id or folder of the base.
        named: name of the base in PEFT's config, for a note if it is not `base`.
    """
    lines = _vllm(exports, base, shape, named)
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


def _vllm(exports: Mapping[str, Export], base: str, shape: ModelShape, named: str | None) -> list[str]:
    if shape.final_norm.bias_name is not None:  # StableLM
        return ["# vLLM has no LoRA for StableLM; serve the merged model instead"]
    ranks = {name: next((known for known in VLLM_RANKS if known >= of.rank), 0) for name, of in exports.items()}
    served = {name: exports[name] for name, rank in ranks.items() if rank}
    lines = []
    if left_out := ", ".join(name for name, rank in ranks.items() if not rank):
        lines = [f"# vLLM accepts ranks up to {VLLM_RANKS[-1]}; serve the merged model of {left_out} instead"]
    if not served:
        return lines
    adapted = {target for export in served.values() for target in export.targets}
    words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(max(ranks.values()))]
    # Without it, each slot has room for every linear, the embedding and the head.
    words += ["--lora-target-modules", *(module for target, module in _VLLM_MODULES.items() if target in adapted)]
    lines.append("# serve with vLLM 0.26 or later")
    if len(served) > 1:  # both are 1 by default
        batch = min(len(served), _LARGEST_BATCH)
        words += ["--max-loras", str(batch), "--max-cpu-loras", str(len(served))]
        lines[-1] += "; --max-loras: adapters in one batch, --max-cpu-loras: in host memory"
    if named not in (None, base):
        note = f"# its filesystem resolver asks for the base that the export names, {named}"
        lines.append(f"{note}; export with --base_name {base}")
    words += ["--lora-modules", *(f"{name}={export.folder}" for name, export in served.items())]
    return [*lines, shlex.join(words)]
