"""Every family against transformers and the oracle: whole and packed rows, greedy decoding with the cache, exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.native_files import write_native
from support.oracle import OracleConfig, load_weights, oracle_logits
from support.peft_models import greedy_tokens, hf_model
from support.tiny_models import EOS_ID, FAMILY_MODELS, random_adapter, write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import read_peft
from megatron_tiedlora.convert.verify import TOLERANCE, verify_export
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, generate
from megatron_tiedlora.parallel.groups import ParallelGroups

PROMPTS = [[5, 17, 300, 44, 8, 201, 9], [77], list(range(3, 27))]
# From shorter to longer than the windows.
MORE_PROMPTS = [[3 + (7 * number + 13 * place) % 316 for place in range(1 + number)] for number in range(17)]


@pytest.fixture(scope="module", params=FAMILY_MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, Any, Any]:
    """A base, this package's model of it in fp32, and transformers' in fp64."""
    folder = tmp_path_factory.mktemp("family") / "model"
    write_tiny_model(folder, num_layers=4, **FAMILY_MODELS[request.param])
    theirs = hf_model(folder, torch.float64)
    source = find_model(str(folder))
    return source, load_model(source, None, dtype=torch.float32), theirs


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 0.8  # far from uniform, so that a fault shows
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_logits_of_whole_rows(model: tuple[ModelSource, Any, Any]) -> None:
    _, ours, theirs = model
    ids = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(3))
    assert_equal(ours.predict(ids, torch.arange(40).expand_as(ids)), theirs(ids).logits)


@torch.no_grad()
def test_logits_of_packed_rows(model: tuple[ModelSource, Any, Any]) -> None:
    """Documents in one row are those that transformers computes alone."""
    _, ours, theirs = model
    ids = torch.cat([torch.tensor([prompt]) for prompt in PROMPTS], dim=1)
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    documents = torch.arange(len(PROMPTS)).repeat_interleave(lengths)[None]
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    found = ours.predict(ids, positions, documents=documents)
    assert_equal(found, torch.cat([theirs(torch.tensor([prompt])).logits for prompt in PROMPTS], dim=1))


@torch.no_grad()
def test_logits_in_fp64_are_those_of_the_oracle(model: tuple[ModelSource, Any, Any]) -> None:
    """Transformers has fp32 in norms and softmax; the oracle does not. Two rows of documents, and all are packed."""
    source, folder = model[0], model[0].folder
    ids = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(4))
    documents = torch.tensor([[0] * 40, [0] * 7 + [1] * 2 + [2] * 31])
    positions = torch.stack([torch.arange(40), torch.cat([torch.arange(n) for n in (7, 2, 31)])])
    ours = load_model(source, None, dtype=torch.float64).predict(ids, positions, documents=documents)
    base = load_weights(folder, torch.float64), OracleConfig.from_folder(folder)
    wanted = oracle_logits(*base, None, ids, None, positions, documents=documents)
    assert ours.dtype == torch.float64 and (ours - wanted).abs().max() <= 1e-10 * wanted.abs().max()


@torch.no_grad()
def test_a_block_may_have_what_no_family_has_together(tmp_path: Path) -> None:
    """A factor of outputs comes behind their norm, a cap behind the divisor; neighbours are rotated in windows."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, **FAMILY_MODELS["gemma2"])
    source = find_model(str(folder))
    block, rope = source.shape.block, replace(source.shape.heads.rope, interleaved=True)
    block = replace(block, multiplier=0.6, heads=replace(block.heads, rope=rope))
    kinds = tuple(kind._replace(rope=rope) for kind in source.shape.kinds)
    shape = replace(source.shape, block=block, logit_divisor=1.7, kinds=kinds)
    ids = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(40).expand_as(ids)
    ours = load_model(replace(source, shape=shape), None, dtype=torch.float64).predict(ids, positions)
    config = replace(OracleConfig.from_folder(folder), block_factor=0.6, logit_divisor=1.7, interleaved=True)
    wanted = oracle_logits(load_weights(folder, torch.float64), config, None, ids)
    assert (ours - wanted).abs().max() <= 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("prompts", [PROMPTS, pytest.param(MORE_PROMPTS, marks=pytest.mark.slow)], ids=["3", "17"])
@torch.no_grad()
def test_greedy_decoding_token_for_token(model: tuple[ModelSource, Any, Any], prompts: list[list[int]]) -> None:
    """Each answer is longer than a window."""
    source, ours, theirs = model
    decoder = Decoder(ours, ParallelGroups(), source.shape)
    (found,) = generate(decoder, [Prompts(prompts, [RowSettings((EOS_ID,), 24)] * len(prompts))])
    assert found == [greedy_tokens(theirs, prompt, 24, eos=EOS_ID) for prompt in prompts]


def test_exports_compute_what_the_adapter_computes(model: tuple[ModelSource, Any, Any], tmp_path: Path) -> None:
    """The merged folder and PEFT's adapter, in transformers and in PEFT."""
    source, base = model[0], model[0].folder
    oracle = random_adapter("tl6", OracleConfig.from_folder(base), rank=4, alpha=6.0)
    adapter = write_native(tmp_path / "native", base, oracle)
    merge_adapter(source, adapter, tmp_path / "merged")
    export_peft(source, adapter, tmp_path / "peft")
    found = verify_export(source, adapter, merged=tmp_path / "merged", peft=tmp_path / "peft")
    assert TOLERANCE == 1e-4 and len(found.logits) == 5 and found.bits[0].compared.count("with the adapter") == 1
    assert int(found.bits[0].compared.split()[5]) >= 3
    assert found.passed and found.logits[0].largest > 0.02, found.report()
    assert json.loads((tmp_path / "merged/config.json").read_text()) == json.loads((base / "config.json").read_text())

    back = read_peft(tmp_path / "peft", source).adapter  # the same product as plain LoRA
    ids = torch.randint(3, 320, (1, 24), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(24).expand_as(ids)
    with torch.no_grad():
        mine, theirs = (load_model(source, a, dtype=torch.float32).predict(ids, positions) for a in (adapter, back))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["q", "k"])
def test_a_norm_of_heads_with_a_zero_is_rejected(tmp_path: Path, part: str) -> None:
    """The backward pass divides by it."""
    base = write_tiny_model(tmp_path / "base", tokenizer=False, **FAMILY_MODELS["qwen3"])
    tensors = load_file(base / "model.safetensors")
    name = f"model.layers.1.self_attn.{part}_norm.weight"
    tensors[name][3] = 0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} has a zero, and training would divide by it"):
        load_model(find_model(str(base)), None, dtype=torch.float32)


@pytest.mark.parametrize(("name", "said"), [
    ("phi3", "has different frequencies beyond 64 tokens (original_max_position_embeddings). Longer rows are not"),
    ("qwen3", "was trained for 256 positions. Give at most 256"),
    ("mistral", "was trained for 256 positions. Give at most 256"),
])  # fmt: skip
def test_longer_rows_than_are_computed_are_rejected_with_both_numbers(tmp_path: Path, name: str, said: str) -> None:
    source = find_model(str(write_tiny_model(tmp_path / "model", tokenizer=False, num_layers=1, **FAMILY_MODELS[name])))
    limit = source.shape.limit.tokens
    source.check_length("--max_length", limit)
    with pytest.raises(UserError) as error:
        source.check_length("--max_length", limit + 1)
    assert f"--max_length {limit + 1}: {source.name} {said}" in str(error.value)
