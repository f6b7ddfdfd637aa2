"""GPT-2B-001's `.nemo`, whole and split: the converted tensors, what transformers and the package compute with them.

The reference is a plain forward pass on NeMo's own tensors; see nemo_files.py, which shares no code with the converter.
"""

from __future__ import annotations

import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from evaluation_runs import evaluate, predictions
from folders import ROOT
from nemo_files import (
    GPT_2B_001,
    MISREADINGS,
    PREFIX,
    Sizes,
    ckpt,
    draw_tensors,
    nemo_logits,
    nemo_members,
    pieces,
    rank_member,
    state_dict,
    write_nemo,
)
from run_helpers import Base, run_ranks, write_rows
from run_helpers import run as run_training
from safetensors.torch import load_file
from wide_models import peak_of

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import sharded
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import run_command
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.convert.nemo import convert_nemo, nemo_model
from megatron_tiedlora.convert.nemo_archive import NemoArchive
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.evaluation.generate import AdapterRows, Decoder
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.parallel.groups import ParallelGroups

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
SMALL = Sizes(layers=2, hidden=16, ffn=24, heads=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted whole file."""
    folder = tmp_path_factory.mktemp("whole")
    convert_nemo(write_nemo(folder / "whole.nemo", nemo_members(draw_tensors())), folder / "model")
    return folder / "model"


def load_stablelm(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def native_logits(folder: Path, adapter: Path | None) -> torch.Tensor:
    """Logits of the package's own model."""
    source, batch = find_model(str(folder)), tokens()
    stage = load_model(source, None if adapter is None else load_native_adapter(adapter), dtype=torch.float32)
    decoder = Decoder(stage, ParallelGroups(), source.shape)
    found = decoder.forward([AdapterRows(batch, torch.arange(40).expand_as(batch), decoder.new_caches(3, 40))])
    assert found is not None
    return found.view(*batch.shape, -1)[..., : len_pieces()]


def tokens() -> torch.Tensor:
    return torch.randint(4, len_pieces(), (3, 40), generator=torch.Generator().manual_seed(3))


def len_pieces() -> int:
    return int(sentencepiece.SentencePieceProcessor(model_proto=pieces()).get_piece_size())


# What is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_a_split_file_gives_the_bits_of_the_whole_one(whole: Path, tmp_path: Path, tp: int, pp: int) -> None:
    members = nemo_members(draw_tensors(), tp=tp, pp=pp)
    assert len(members) == tp * pp + 2 and rank_member(tp, pp, tp - 1, pp - 1) in members
    config = convert_nemo(write_nemo(tmp_path / "split.nemo", members), tmp_path / "model")
    assert config == json.loads((whole / "config.json").read_text())
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "model"))
    assert theirs.keys() == ours.keys() and len(ours) == 3 + 4 * 11 + 1
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_transformers_and_the_package_compute_what_the_plain_forward_pass_does(whole: Path) -> None:
    """And a wrong reading of the format is far from it."""
    tensors, batch = draw_tensors(), tokens()
    with torch.no_grad():
        found = load_stablelm(whole)(batch).logits
    expected = nemo_logits(tensors, batch)[..., : len_pieces()]
    largest = float(expected.abs().max())
    for computed in (found, native_logits(whole, None)):
        assert float((computed - expected).abs().max()) < 1e-5 * largest
    for wrong in MISREADINGS:
        moved = nemo_logits(tensors, batch, wrong=wrong)[..., : len_pieces()]
        assert float((moved - expected).abs().max()) > 0.3 * largest, wrong


def test_shards_hold_the_same_tensors(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tiedlora.convert.nemo.sharded", partial(sharded, shard_bytes=40_000))
    nemo = write_nemo(tmp_path / "whole.nemo", nemo_members(draw_tensors()))
    convert_nemo(nemo, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values()) and len(files) > 4
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(whole / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert load_stablelm(tmp_path / "model").num_parameters() == sum(tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_norms_become_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    """In NeMo's O2, a module's name stands in front of all tensors."""
    tensors = {name: tensor.to(dtype) for name, tensor in draw_tensors(SMALL).items()}
    members = nemo_members(draw_tensors(SMALL), SMALL, megatron_amp_O2=True)
    members["model_weights.ckpt"] = ckpt(state_dict(tensors, "model.module.language_model."))
    config = convert_nemo(write_nemo(tmp_path / "o2.nemo", members), tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert {name: t.dtype for name, t in found.items()} == {n: torch.float32 if "norm" in n else dtype for n in found}
    theirs = tensors["encoder.layers.1.post_attention_layernorm.weight"]
    assert torch.equal(found["model.layers.1.post_attention_layernorm.weight"], theirs.float() + 1)
    assert torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], tensors["encoder.layers.0.mlp.dense_h_to_4h.weight"][24:]
    )


def test_tensors_are_found_where_torch_finds_them(tmp_path: Path) -> None:
    """Also views of a shared storage, and what has no values."""
    whole = torch.arange(40.0).view(5, 8)
    content = {"a": whole, "part": whole[2:4], "none": torch.empty(0, 3), "one": torch.tensor(7.0).half()}
    path = write_nemo(tmp_path / "x.nemo", {"pad": b"0" * 777, "x.ckpt": ckpt(state_dict(content))})
    found = NemoArchive(path).tensors("x.ckpt", tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["x.nemo"]  # the copy has no name any more
    assert list(found) == [PREFIX + name for name in content]
    for name, tensor in content.items():
        assert torch.equal(found[PREFIX + name], tensor) and found[PREFIX + name].dtype == tensor.dtype


def test_a_file_of_9_gib_in_the_archive_is_found(tmp_path: Path) -> None:
    """GPT-2B-001's weights are larger than a tar's plain header can say. The file has a hole in their place."""
    size = 9 * 2**30
    with (tmp_path / "x.nemo").open("wb") as stream:
        for name in ("a.ckpt", "b.ckpt"):
            member = tarfile.TarInfo(f"./{name}")
            member.size, member.mtime = size, 1.5  # NeMo's have fractions of seconds, which are extended fields too
            stream.write(member.tobuf())
            start = stream.tell()
            stream.seek(start + size)
        stream.truncate()
    members = NemoArchive(tmp_path / "x.nemo").members
    assert [place.size for place in members.values()] == [size, size] and members["b.ckpt"].offset_data == start


def test_the_tokenizer_gives_sentencepiece_ids_and_has_its_special_tokens(whole: Path) -> None:
    from transformers import AutoTokenizer

    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces())
    assert (whole / "tokenizer.model").read_bytes() == pieces()
    config = json.loads((whole / "config.json").read_text())
    assert config["vocab_size"] == processor.get_piece_size() == 380
    for tokenizer in (load_tokenizer(whole), AutoTokenizer.from_pretrained(whole)):
        found = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert found == (1, 2, 3) == tuple(config[f"{role}_token_id"] for role in ("pad", "bos", "eos"))
        for text in ("Tom has 12,345.60 apples", "a\nb\n\n c", "  two", "naïve 日本語 😀", "</s> <unk>", ""):
            assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)


def test_the_real_settings_are_those_of_the_preset() -> None:
    """Whose parameters test_presets.py counts."""
    values = nemo_model(GPT_2B_001, source="x").hf_config(vocab_size=256_000)
    assert shape_from_hf(values) == shape_from_hf(PRESETS["gpt-2b-001"])
    assert (values["partial_rotary_factor"], values["max_position_embeddings"]) == (0.5, 4096)


# The command ------------------------------------------------------------------------------------------------------


def run_tool(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run_command(partial(call, "convert-nemo"), [str(argument) for argument in arguments])
    return int(str(end.value.code))


def test_the_command_converts_or_says_why_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    members = nemo_members(draw_tensors(SMALL), SMALL)
    good = write_nemo(tmp_path / "good.nemo", members)
    assert run_tool("--nemo", good, "--output", tmp_path / "model") == 0
    assert f"(2 layers, 380 pieces, float32): {tmp_path / 'model'}" in capfd.readouterr().out
    bad = write_nemo(tmp_path / "bad.nemo", {**members, "../evil": b""})
    for status, nemo, output, message in (
        (1, bad, tmp_path / "other", f"error: {bad}: cannot be read"),
        (2, tmp_path / "none.nemo", tmp_path / "other", f"error: --nemo {tmp_path / 'none.nemo'}: no such file"),
        (2, good, tmp_path / "model", f"error: --output {tmp_path / 'model'} exists; give a new folder"),
    ):
        assert run_tool("--nemo", nemo, "--output", output) == status
        printed = capfd.readouterr()
        assert printed.err.startswith(message) and printed.err.count("\n") == 1 and not printed.out
    assert sorted(item.name for item in tmp_path.iterdir()) == ["bad.nemo", "good.nemo", "model"]


@pytest.mark.distributed
def test_convert_train_evaluate_and_merge_by_commands(tmp_path: Path) -> None:
    """From a file that is split in four to a merged folder that transformers reads, trained on four other ranks."""
    nemo = write_nemo(tmp_path / "split.nemo", nemo_members(draw_tensors(), tp=2, pp=2))
    converted, run, merged = (tmp_path / name for name in ("converted", "run", "merged"))
    base = Base(tmp_path, converted, write_rows(tmp_path / "train.jsonl", 16), write_rows(tmp_path / "dev.jsonl", 4))
    work = tmp_path / "work"
    script = ROOT / "tools" / "convert_nemo.py"
    run_ranks([f"--nemo={nemo}", f"--output={converted}"], folder=work, script=script).expect(0)
    training = {"tensor_parallel": 2, "pipeline_parallel": 2, "ds_config": "zero1.json", "max_steps": 5}
    run_training(base, run, ranks=4, method="tl6", learning_rate=0.2, **training)
    adapter = run / "adapter"
    evaluate(tmp_path / "scores", work=work, test_file=base.validation, max_new_tokens=8, adapter=adapter)
    assert len(predictions(tmp_path / "scores")) == 4
    merge = ROOT / "tools" / "merge_adapter.py"
    run_ranks([f"--adapter={adapter}", f"--output={merged}"], folder=work, script=merge).expect(0)
    ours = native_logits(converted, adapter)
    with torch.no_grad():
        theirs, plain = (load_stablelm(folder)(tokens()).logits for folder in (merged, converted))
    largest = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) < 1e-4 * largest
    assert float((plain - theirs).abs().max()) > 1e-2 * largest


# Memory -----------------------------------------------------------------------------------------------------------

IMPORTS = "import torch; from megatron_tiedlora.commands.front import call"


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_a_large_file_takes_the_memory_of_a_few_rows(tmp_path: Path, tp: int) -> None:
    """GPT-2B-001's layers, four of them, and a sixteenth of its vocabulary."""
    sizes = Sizes(layers=4, hidden=2048, ffn=5440, heads=16, padded=16_384)
    nemo = write_nemo(tmp_path / "large.nemo", nemo_members(draw_tensors(sizes), sizes, tp=tp))
    assert nemo.stat().st_size > 10**9
    convert = 'assert call("convert-nemo", ["--nemo", sys.argv[1], "--output", sys.argv[2]]) == 0'
    _, start, most, samples = peak_of(IMPORTS, convert, nemo, tmp_path / "model")
    print(f"tp {tp}: {(most - start) / 1e6:.0f} MB of RssAnon above the import of torch, in {samples} samples")
    assert samples > 100 and most - start < 150e6
