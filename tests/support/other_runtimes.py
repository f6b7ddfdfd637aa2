"""Greedy decoding of a model folder in transformers, llama.cpp and CTranslate2. Uses nothing of the package.

llama.cpp and CTranslate2 are installed where pyproject.toml says so: on platforms for which they have a wheel.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import ROOT
from gguf_files import write_gguf
from packaging.requirements import Requirement

CONTEXT = 64  # tokens, of prompt and continuation
_ERROR = 4  # of llama.cpp's log levels


def needs_wheel(name: str) -> pytest.MarkDecorator:
    """A mark that skips a test where pyproject.toml does not install `name`. Where it does, `name` has to be there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    marker = next(found.marker for found in map(Requirement, extras["test-base"]) if found.name == name)
    is_here = marker is None or marker.evaluate()
    return pytest.mark.skipif(not is_here, reason=f"{name} is installed where {marker}: it has no wheel for others")


def transformers_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers decodes in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(token) for token in rows[0, len(prompt) :]]


def llama_cpp_tokens(folder: Path, prompt: list[int], count: int, *, scratch: Path) -> list[int]:
    """What llama.cpp decodes in fp32, with an fp32 cache, from a GGUF file in `scratch`."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()

    def show_errors(level: int, text: Any, _: Any) -> None:
        if level == _ERROR:
            print(ffi.string(text).decode())

    log = ffi.callback("ggml_log_callback", show_errors)
    lib.llama_log_set(log, ffi.NULL)
    model = lib.llama_model_load_from_file(
        str(write_gguf(folder, scratch / "model.gguf")).encode(), lib.llama_model_default_params()
    )
    assert model != ffi.NULL, "llama.cpp does not load the file"
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, 1, 1
    settings.type_k = settings.type_v = lib.GGML_TYPE_F32
    settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it would round to 16 bits
    context = lib.llama_init_from_model(model, settings)
    assert context != ffi.NULL, "llama.cpp does not run the file"
    size, found, unread = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), [], list(prompt)
    for _ in range(count):
        tokens = ffi.new("llama_token[]", unread)
        assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(unread))) == 0
        logits = torch.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, -1), 4 * size), dtype=torch.float32)
        unread = [int(logits.argmax())]
        found += unread
    lib.llama_free(context)
    lib.llama_model_free(model)
    lib.llama_log_set(ffi.NULL, ffi.NULL)
    return found


def ctranslate2_tokens(folder: Path, prompt: list[int], count: int, *, scratch: Path) -> list[int]:
    """What CTranslate2 decodes in fp32 from its own reading of the folder, which needs a tokenizer.

    With transformers 5 it computes other kinds of rope and windows wrongly, without a word.
    """
    import ctranslate2
    from transformers import AutoTokenizer

    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(scratch / "converted"))
    generator: Any = ctranslate2.Generator(str(scratch / "converted"), compute_type="float32", intra_threads=1)
    words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(prompt)
    (result,) = generator.generate_batch([words], max_length=count, include_prompt_in_result=False, end_token=[])
    return [int(token) for token in result.sequences_ids[0]]
