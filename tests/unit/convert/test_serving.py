"""One command serves several exports."""

from __future__ import annotations

from pathlib import Path

from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.convert.serving import serve_together
from megatron_tiedlora.model.families import shape_from_hf

PLAIN = shape_from_hf(PRESETS["llama2-7b"])


def test_one_command_serves_all_by_name() -> None:
    """With room for the largest rank that vLLM serves; others are left out."""
    outputs = {"a": (Path("run/a/peft"), 3), "b": (Path("my run/b/peft"), 9), "huge": (Path("run/huge/peft"), 513)}
    comment, command = serve_together(outputs, "org/base", PLAIN)
    assert comment.startswith("# serve all with vLLM")
    modules = "--lora-modules a=run/a/peft 'b=my run/b/peft'"
    assert command == f"vllm serve org/base --enable-lora {modules} --max-lora-rank 16"
    assert serve_together({"huge": outputs["huge"]}, "org/base", PLAIN) == []
    assert serve_together(outputs, "org/base", shape_from_hf({"model_type": "stablelm"})) == []
