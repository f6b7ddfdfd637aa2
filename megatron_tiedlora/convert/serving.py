"""How an exported adapter is served: the commands of vLLM, SGLang and llama.cpp, as lines for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV, ModelShape

# The values that vLLM accepts for --max-lora-rank, the maximum rank that it serves (default 16).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_MODULES = {QKV: "qkv_proj", OUTPUT: "o_proj", GATE_UP: "gate_up_proj", DOWN: "down_proj"}  # its fused linears


def serve_hints(output: Path, base: str, rank: int, shape: ModelShape, targets: Sequence[str]) -> list[str]:
    """The commands that serve the exported adapter in the folder `output`, each after a comment that names the program.

    Args:
        base: hub id or folder of the base.
        rank: of the export.
        targets: names of the adapted linears.
    """
    rest = ["# serve with SGLang", _sglang(output, base)]
    rest += ["# serve with llama.cpp, in its folder", *_llama_cpp(output, base)]
    if shape.final_norm.bias_name is not None:  # StableLM
        return ["# vLLM serves this model without adapters; serve the merged model instead", *rest]
    fitting = min((known for known in VLLM_RANKS if known >= rank), default=None)
    if fitting is None:
        return [f"# vLLM accepts ranks up to {VLLM_RANKS[-1]}; serve the merged model instead", *rest]
    vllm = ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"tied={output}", "--max-lora-rank", str(fitting)]
    modules = ["--lora-target-modules", *(_VLLM_MODULES[name] for name in targets)]
    return [f"# serve with vLLM; a newer one needs less memory with {shlex.join(modules)}", shlex.join(vllm), *rest]


def _sglang(output: Path, base: str) -> str:
    """SGLang finds the adapter's rank and modules itself, and has no maximum rank."""
    return shlex.join(["python", "-m", "sglang.launch_server", "--model-path", base, "--lora-paths", f"tied={output}"])


def _llama_cpp(output: Path, base: str) -> list[str]:
    gguf = f"{output.name}.gguf"
    convert = ["python", "convert_lora_to_gguf.py", str(output), "--base", base, "--outfile", gguf]
    return [shlex.join(convert), f"llama-server -m BASE.gguf --lora {shlex.quote(gguf)}"]
