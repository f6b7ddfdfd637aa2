"""Commands that serve exports, as train, export and the docs show them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from folders import ROOT

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.convert.export_peft import Export, serve_hints
from megatron_tiedlora.model.families import shape_from_hf

PLAIN = shape_from_hf(PRESETS["llama2-7b"])
STABLELM = shape_from_hf({"model_type": "stablelm"})
VLLM = "# serve with vLLM 0.26 or later"


def one(rank: int, *targets: str, folder: str = "peft") -> dict[str, Export]:
    return {"tied": Export(Path(folder), rank, targets or ("qkv",))}


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (100, 128), (512, 512)])
def test_the_serve_command_allows_the_rank(rank: int, served: int) -> None:
    """A shell takes the lines as they stand: programs are named in comments."""
    lines = serve_hints(one(rank, "down_proj", "qkv", folder="out dir/peft"), "org/base", PLAIN)
    comments, commands = [line for line in lines if line[0] == "#"], [line for line in lines if line[0] != "#"]
    assert commands == [
        f"vllm serve org/base --enable-lora --max-lora-rank {served} --lora-target-modules qkv_proj down_proj"
        " --lora-modules 'tied=out dir/peft'",
        "python -m sglang.launch_server --model-path org/base --lora-paths 'tied=out dir/peft'",
        "python convert_lora_to_gguf.py 'out dir/peft' --base org/base --outfile peft.gguf",
        "llama-server -m BASE.gguf --lora peft.gguf",
    ]
    assert comments == [VLLM, "# serve with SGLang", "# serve with llama.cpp, in its folder"]


def test_what_vllm_does_not_serve_is_said() -> None:
    """A rank beyond its own, and StableLM, for which it has no LoRA: alone and among several."""
    for exports, shape in ((one(513), PLAIN), (one(8), STABLELM)):
        vllm, *rest = serve_hints(exports, "org/base", shape)
        assert vllm.startswith("# vLLM ") and "serve the merged model" in vllm
        others = "\n".join(rest)
        assert "sglang.launch_server --model-path org/base" in others and "convert_lora_to_gguf.py peft" in others
        assert "vllm serve" not in others
    several = {"a": Export(Path("a"), 8, ["qkv"]), "b": Export(Path("b"), 8, ["qkv"])}
    assert serve_hints(several, "org/base", STABLELM) == [
        "# vLLM has no LoRA for StableLM; serve the merged model instead"
    ]
    huge = {name: export._replace(rank=513) for name, export in several.items()}
    (said,) = serve_hints(huge, "org/base", PLAIN)
    assert said == "# vLLM accepts ranks up to 512; serve the merged model of a, b instead"


def test_one_command_serves_all_by_name() -> None:
    """With room for the largest rank that vLLM serves and for all targets; others are left out, which is said."""
    outputs = {
        "a": Export(Path("run/a/peft"), 3, ["qkv"]),
        "b": Export(Path("my run/b/peft"), 9, ["down_proj", "qkv"]),
        "huge": Export(Path("run/huge/peft"), 513, ["gate_up"]),
    }
    left_out, comment, command = serve_hints(outputs, "org/base", PLAIN)
    assert left_out == "# vLLM accepts ranks up to 512; serve the merged model of huge instead"
    assert comment == f"{VLLM}; --max-loras: adapters in one batch, --max-cpu-loras: in host memory"
    assert command == (
        "vllm serve org/base --enable-lora --max-lora-rank 16 --lora-target-modules qkv_proj down_proj --max-loras 2"
        " --max-cpu-loras 2 --lora-modules a=run/a/peft 'b=my run/b/peft'"
    )
    of_one = serve_hints({name: outputs[name] for name in ("a", "huge")}, "org/base", PLAIN)
    assert "--max-loras" not in of_one[-1], "one is served, and that is vLLM's default"
    many = {f"a{number}": Export(Path(f"a{number}"), 8, ["o_proj"]) for number in range(100)}
    assert " --max-loras 8 --max-cpu-loras 100 " in serve_hints(many, "org/base", PLAIN)[-1], "no slot for each"


def test_the_name_that_vllm_s_resolver_asks_for_is_said_where_it_differs() -> None:
    lines = serve_hints(one(8), "/shared/llama2-7b", PLAIN, named="llama2-7b")
    assert lines[1] == (
        "# its filesystem resolver asks for the base that the export names, llama2-7b; export with --base_name"
        " /shared/llama2-7b"
    )
    assert lines[2].startswith("vllm serve /shared/llama2-7b ")
    for named in ("/shared/llama2-7b", None):
        assert not any("resolver" in line for line in serve_hints(one(8), "/shared/llama2-7b", PLAIN, named=named))


# Pages of the docs: what they show is what is printed. test_plan_command.py compares guide.md.


def block(page: str) -> list[str]:
    """The lines of the page's block that has the command of vLLM with LoRA."""
    text = (ROOT / page).read_text()
    (found,) = (part for part in re.split(r"\n\n", text) if part.startswith("    ") and "--enable-lora" in part)
    return [line.removeprefix("    ") for line in found.split("\n")]


def test_docs_of_one_and_of_several_exports() -> None:
    exports = one(16, *TARGET_NAMES, folder="RUN/peft-16")
    assert block("docs/adapters.md") == serve_hints(exports, "/models/llama2-7b", PLAIN, named="llama2-7b")
    targets = {"support": ["qkv"], "legal": ["qkv"], "notes": TARGET_NAMES, "titles": ["qkv"]}
    ranks = {"legal": 16}
    exports = {name: Export(Path(f"runs/four/{name}/peft"), ranks.get(name, 8), of) for name, of in targets.items()}
    assert block("docs/many_adapters.md") == serve_hints(exports, "/shared/llama2-7b", PLAIN)
