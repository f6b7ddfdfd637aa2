"""How an exported adapter is served: the commands of vLLM, SGLang and llama.cpp, as lines for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
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
    vllm = _vllm({"tied": output}, base, fitting)
    modules = ["--lora-target-modules", *(_VLLM_MODULES[name] for name in targets)]
    return [f"# serve with vLLM; a newer one needs less memory with {shlex.join(modules)}", vllm, *rest]


def serve_together(outputs: Mapping[str, tuple[Path, int]], base: str, shape: ModelShape) -> list[str]:
    """The command with which vLLM serves several exported adapters by name, after a comment; none if it serves none.

    Args:
        outputs: (folder, rank) of each export, by its name.
        base: hub id or folder of the base.
    """
    fitting = {
        name: next((known for known in VLLM_RANKS if known >= rank), None) for name, (_, rank) in outputs.items()
    }
    served = {name: outputs[name][0] for name, known in fitting.items() if known is not None}
    if not served or shape.final_norm.bias_name is not None:
        return []
    largest = max(known for known in fitting.values() if known is not None)
    comment = "# serve all with vLLM, by name (--max-loras N: requests of N of them in one batch)"
    return [comment, _vllm(served, base, largest)]


def _vllm(outputs: Mapping[str, Path], base: str, max_rank: int) -> str:
    modules = [f"{name}={output}" for name, output in outputs.items()]
    return shlex.join(
        ["vllm", "serve", base, "--enable-lora", "--lora-modules", *modules, "--max-lora-rank", str(max_rank)]
    )


def _sglang(output: Path, base: str) -> str:
    """SGLang finds the adapter's rank and modules itself, and has no maximum rank."""
    return shlex.join(["python", "-m", "sglang.launch_server", "--model-path", base, "--lora-paths", f"tied={output}"])


def _llama_cpp(output: Path, base: str) -> list[str]:
    gguf = f"{output.name}.gguf"
    convert = ["python", "convert_lora_to_gguf.py", str(output), "--base", base, "--outfile", gguf]
    return [shlex.join(convert), f"llama-server -m BASE.gguf --lora {shlex.quote(gguf)}"]
