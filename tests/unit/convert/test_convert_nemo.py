"""GPT-2B-001's `.nemo`, whole and split: the converted tensors, what transformers and the package compute with them;
and what is refused: settings that compute something else, broken and hostile archives, in one line each.

The reference is a plain forward pass on NeMo's own tensors; see nemo_files.py, which shares no code with the converter.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from support.evaluation_runs import evaluate, predictions
from support.nemo_files import (
    GPT_2B_001,
    MISREADINGS,
    PREFIX,
    TOKENIZER,
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
from support.run_helpers import Base, write_rows
from support.run_helpers import run as run_training
from support.task_files import refusal
from support.wide_models import peak_of

from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import sharded
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import run_command
from megatron_tiedlora.convert.nemo import convert_nemo, nemo_model
from megatron_tiedlora.convert.nemo_archive import NemoArchive
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.evaluation.decoder import AdapterRows, Decoder
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
@pytest.mark.parametrize("pp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_convert_train_evaluate_and_merge_by_commands(tmp_path: Path, pp: int) -> None:
    """From a file that is split in four to a merged folder that transformers reads, trained on two or four ranks."""
    nemo = write_nemo(tmp_path / "split.nemo", nemo_members(draw_tensors(), tp=2, pp=2))
    converted, run, merged = (tmp_path / name for name in ("converted", "run", "merged"))
    base = Base(tmp_path, converted, write_rows(tmp_path / "train.jsonl", 16), write_rows(tmp_path / "dev.jsonl", 4))
    work = tmp_path / "work"
    assert call("convert-nemo", [f"--nemo={nemo}", f"--output={converted}"]) == 0
    training = {"tensor_parallel": 2, "pipeline_parallel": pp, "ds_config": "zero1.json", "max_steps": 5}
    run_training(base, run, ranks=2 * pp, method="tl6", learning_rate=0.2, **training)
    adapter = run / "adapter"
    evaluate(tmp_path / "scores", work=work, test_file=base.validation, max_new_tokens=8, adapter=adapter)
    assert len(predictions(tmp_path / "scores")) == 4
    assert call("merge", [f"--adapter={adapter}", f"--output={merged}"]) == 0
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


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("normalization", "layernorm"), ("normalization", "rmsnorm"), ("activation", "swiglu"), ("activation", "geglu"),
    ("bias", True), ("transformer_block_type", "post_ln"), ("position_embedding_type", "learned_absolute"),
    ("attention_type", "multiquery"), ("headscale", True), ("openai_gelu", True), ("normalize_attention_scores", False),
    ("num_query_groups", 1), ("seq_len_interpolation_factor", 2), ("megatron_legacy", True), ("mcore_gpt", True),
    ("share_embeddings_and_output_weights", True), ("kv_channels", 4), ("rotary_percentage", 0.45),
    ("rotary_percentage", 0), ("rotary_base", 500_000), ("transformer_engine", True), ("num_moe_experts", 8),
    ("virtual_pipeline_model_parallel_size", 2), ("num_layers", 2.0), ("num_layers", True), ("hidden_size", 17),
    ("hidden_size", "${model.x}"), ("max_position_embeddings", "${.nothing}"), ("layernorm_epsilon", "small"),
    ("ffn_hidden_size", None), ("tensor_model_parallel_size", 2000), ("pipeline_model_parallel_size", 0),
    ("use_emha", True), ("apply_embedding_scaling", True), ("pre_process", False),
])  # fmt: skip
def test_a_setting_that_computes_something_else_is_named(name: str, value: Any) -> None:
    said = refusal(nemo_model, SMALL.settings(**{name: value}), source="here")
    assert re.match(f"here: {name} (= .* cannot be converted|is set)", said)


ABSENT = object()
OTHER_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"tensor_model_parallel_size": 4}, "num_attention_heads = 2 cannot be converted: 2 is not a multiple of 4"),
    ({"pipeline_model_parallel_size": 3}, "num_layers = 2 cannot be converted: 2 is not a multiple of 3"),
    ({"tensor_model_parallel_size": 2, "ffn_hidden_size": 25}, "ffn_hidden_size = 25 cannot be converted: 25 is"),
    ({"normalization": ABSENT}, "normalization is absent, which cannot be converted"),  # it means something else
    ({"activation": ABSENT}, "activation is absent, which"),
    ({"position_embedding_type": ABSENT}, "position_embedding_type is absent, which"),
    ({"bias": ABSENT}, "bias is absent, which"),
    ({"share_embeddings_and_output_weights": ABSENT}, "share_embeddings_and_output_weights is absent, which"),
    *(
        ({"tokenizer": {**SMALL.settings()["tokenizer"], name: value}}, f"tokenizer: {name} = ")
        for name, value in (("library", "megatron"), ("sentencepiece_legacy", True), ("model", "/tokenizers/a.model"))
    ),
]


@pytest.mark.parametrize(("changes", "message"), OTHER_SETTINGS)
def test_sizes_and_tokenizers_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    values = {name: value for name, value in SMALL.settings(**changes).items() if value is not ABSENT}
    assert refusal(nemo_model, values, source="here").startswith(f"here: {message}")


def test_numbers_in_another_notation_are_read() -> None:
    model = nemo_model(SMALL.settings(layernorm_epsilon="1e-6", rotary_percentage=1, kv_channels=8), source="here")
    assert (model.norm_eps, model.rotary_share, model.max_positions) == (1e-6, 1.0, 128)


# Archives ------------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, path: Path) -> str:
    """The one line, without the file's name, of a conversion that fails and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    message = refusal(convert_nemo, path, tmp_path / "model")
    assert sorted(tmp_path.rglob("*")) == before
    assert message.startswith(f"{path}: ") and len(message) < 600
    return message.removeprefix(f"{path}: ")


class Hostile:
    """Runs a command where a pickle is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression) as archive:
        for name, content in {"version": b"3\n", **files}.items():
            archive.writestr(f"archive/{name}", content)
    return written.getvalue()


def weights(change: Callable[[dict[str, Any]], object]) -> bytes:
    tensors: dict[str, Any] = draw_tensors(SMALL)
    change(tensors)
    return ckpt(state_dict(tensors))


def twice(raw: bytes) -> bytes:
    """A `.ckpt` with a second pickle of the same name."""
    written = io.BytesIO(raw)
    with zipfile.ZipFile(written, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of it
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return written.getvalue()


def values_cut(raw: bytes) -> bytes:
    """A `.ckpt` in which one file of values has fewer bytes than the pickle says."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return zipped({**files, "data/3": files["data/3"][:-4]})


_QKV, _NORM = "encoder.layers.0.self_attention.query_key_value.weight", "encoder.final_layernorm.weight"
BROKEN_WEIGHTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "runs a command": (lambda: weights(lambda t: t.update(evil=Hostile())), "'posix system', which no state dict"),
    "buffer": (lambda: weights(lambda t: t.update(x=io.BytesIO())), "_io BytesIO"),
    "extra state": (lambda: weights(lambda t: t.update({"x._extra_state": io.BytesIO()})), "TransformerEngine"),
    "empty extra state": (lambda: weights(lambda t: t.update({"x._extra_state": None})), "TransformerEngine"),
    "whole numbers": (lambda: weights(lambda t: t.update(x=torch.arange(3))), "'torch LongStorage'"),
    "parameter": (lambda: weights(lambda t: t.update(x=torch.nn.Parameter(t[_NORM]))), "_rebuild_parameter"),
    "not a tensor": (lambda: weights(lambda t: t.update(x=3)), "x' is not a tensor"),
    "no table": (lambda: ckpt((1, 2)), "is not a dict"),
    "transposed": (lambda: weights(lambda t: t.update({_QKV: t[_QKV].T})), "is not stored row by row"),
    "missing": (lambda: weights(lambda t: t.pop(_QKV)), f"{_QKV} is missing"),
    "unknown": (lambda: weights(lambda t: t.update({"encoder.x.bias": t[_NORM]})), "a tensor 'encoder.x.bias'"),
    "shape": (lambda: weights(lambda t: t.update({_QKV: t[_QKV][1:].clone()})), "(47, 16), expected (48, 16)"),
    "width": (lambda: weights(lambda t: t.update({"output_layer.weight": t[_QKV].view(96, 8)})), "shape (96, 8)"),
    "few pieces": (lambda: weights(lambda t: t.update({"output_layer.weight": t[_QKV]})), "48 rows, but the tokenizer"),
    "base": (lambda: weights(lambda t: t["rotary_pos_emb.inv_freq"].mul_(0.9)), "inv_freq does not match base 10000"),
    "nan": (lambda: weights(lambda t: t[_NORM].fill_(float("nan"))), "model.norm.weight has values that are not"),
    "dtypes": (lambda: weights(lambda t: t.update({_QKV: t[_QKV].half()})), "float16 and float32"),
    "mcore": (lambda: ckpt(OrderedDict({"model.decoder.x": torch.ones(1)})), "(Megatron-Core's name)"),
    "other prefix": (lambda: ckpt(OrderedDict({"rm_head.weight": torch.ones(1)})), "holds 'rm_head.weight'"),
    "no zip": (lambda: b"no zip", "File is not a zip file"),
    "cut zip": (lambda: weights(str)[:-5000], "is not a zip"),
    "compressed": (lambda: zipped({"data.pkl": b"\x80\x02}." * 99}, zipfile.ZIP_DEFLATED), "is compressed"),
    "no pickle": (lambda: zipped({"x": b""}), "cannot be read as a state dict"),
    "big endian": (lambda: zipped({"data.pkl": b"\x80\x02}.", "byteorder": b"big"}), "byte order"),
    "values cut": (lambda: values_cut(weights(str)), "some values of a tensor are missing"),
    "operation": (lambda: zipped({"data.pkl": b"\x80\x02]."}), "the operation EMPTY_LIST"),
    "calls text": (lambda: zipped({"data.pkl": b"\x80\x02X\x01\x00\x00\x00a)R."}), "pickle is not a state dict"),
    "deep": (lambda: zipped({"data.pkl": b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s."}), "more than 20,000 tuples"),
    "less deep": (lambda: zipped({"data.pkl": b"\x80\x02})" + b"\x85" * 20_000 + b"K\x01s."}), "a name is not text"),
    # Each level has the one before twice, so that the hash of the last one never ends.
    "wide": (lambda: zipped({"data.pkl": b"\x80\x02})q\0" + b"h\0h\0\x86q\0" * 99 + b"K\x01s."}), "uses a tuple twice"),
    "hidden tuple": (lambda: zipped({"data.pkl": b"\x80\x02}K\x01\x85(uq\0h\0\x86K\x01s."}), "uses a tuple twice"),
    "two pickles": (lambda: twice(weights(str)), "holds a file twice"),
    "pickle cut": (lambda: zipped({"data.pkl": b"\x80\x02}"}), "pickle exhausted before seeing STOP"),
    "memo": (lambda: zipped({"data.pkl": b"\x80\x02}r\xff\xff\xff\xff."}), "is missing"),
    "many axes": (lambda: weights(lambda t: t.update(x=torch.ones([1] * 9))), "tensor 'x' that does not belong there"),
    "huge pickle": (lambda: zipped({"data.pkl": b"\x80\x02}" + b"0" * 2**24}), "bytes, but at most"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_WEIGHTS)
def test_broken_or_hostile_weights_are_one_line(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = BROKEN_WEIGHTS[case]
    path = write_nemo(tmp_path / "x.nemo", {**nemo_members(draw_tensors(SMALL), SMALL), "model_weights.ckpt": make()})
    assert message in refused(tmp_path, path)


def changed(change: Callable[[dict[str, bytes]], object], tp: int = 1, pp: int = 1) -> dict[str, bytes]:
    members = nemo_members(draw_tensors(SMALL), SMALL, tp=tp, pp=pp)
    change(members)
    return members


@pytest.mark.parametrize(("make", "message"), [
    (lambda: changed(lambda m: m.pop(rank_member(2, 1, 1, 0)), tp=2), "mp_rank_01/model_weights.ckpt is missing"),
    (lambda: changed(lambda m: m.pop(rank_member(1, 2, 0, 1)), pp=2), "tp_rank_00_pp_rank_001/model_weights.ckpt is m"),
    (lambda: changed(lambda m: m.update({rank_member(4, 1, 2, 0): b""}), tp=2), "which does not belong to tensor"),
    (lambda: changed(lambda m: m.update({"model_weights/common.pt": b""})), "distributed checkpoint (model_weights/)"),
    (lambda: changed(lambda m: m.pop("model_config.yaml")), "holds no model_config.yaml"),
    (lambda: changed(lambda m: m.update({"model_config.yaml": b"\xff"})), "model_config.yaml: not valid YAML"),
    (lambda: changed(lambda m: m.update({"model_config.yaml": b"a: !!python/name:os.system x"})), "not valid YAML"),
    (lambda: changed(lambda m: m.update({"model_config.yaml": b" " * 2**19})), "model_config.yaml is larger than"),
    (lambda: changed(lambda m: m.pop(TOKENIZER)), f"holds no {TOKENIZER}"),
    (lambda: changed(lambda m: m.update({TOKENIZER: b"junk"})), "cannot be read as a SentencePiece model"),
    (lambda: changed(lambda m: m.update({TOKENIZER: pieces(treat_whitespace_as_suffix=True)})), "returns different id"),
    (lambda: changed(lambda m: m.update({"../evil": b""})), "the name './../evil' leads out of the archive"),
])  # fmt: skip
def test_another_archive_is_one_line(tmp_path: Path, make: Callable[[], dict[str, bytes]], message: str) -> None:
    assert message in refused(tmp_path, write_nemo(tmp_path / "x.nemo", make()))


@pytest.mark.parametrize(("kind", "message"), [
    ("absolute", "'/model_config.yaml' leads out of"), ("gzip", "gzip -dc"), ("xz", "cannot be read as a .nemo"),
    (tarfile.SYMTYPE, "'link' is not a plain file"), (tarfile.LNKTYPE, "'link' is not a plain file"),
    (tarfile.FIFOTYPE, "'link' is not a plain file"), ("twice", "holds 'model_config.yaml' twice"),
    ("empty", "cannot be read as a .nemo"), ("folder", "Is a directory"), ("many fields", "has 100 extended fields"),
    ("long name", "its list of files is longer than"),
])  # fmt: skip
def test_another_kind_of_file_is_one_line(tmp_path: Path, kind: Any, message: str) -> None:
    members, path = nemo_members(draw_tensors(SMALL), SMALL), tmp_path / "x.nemo"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind in ("gzip", "xz"):
        write_nemo(path, members, mode=f"w:{kind.removesuffix('ip')}")
    elif kind == "absolute":
        write_nemo(path, members, names="/{}")
    elif kind == "long name":
        header = tarfile.TarInfo("././@PaxHeader")
        header.type, header.size = tarfile.XHDTYPE, 2**25
        path.write_bytes(header.tobuf() + b"\0" * 2**25)
    elif kind == "many fields":
        path.write_bytes(tarfile.TarInfo.create_pax_global_header({f"x{n}": "1" for n in range(100)}))
        path.write_bytes(path.read_bytes() + write_nemo(tmp_path / "plain.nemo", members).read_bytes())
    else:
        write_nemo(path, members)
        with tarfile.open(path, "a") as tar:
            added = tarfile.TarInfo("./model_config.yaml" if kind == "twice" else "link")
            if kind != "twice":
                added.type, added.linkname = kind, "/etc/passwd"
            tar.addfile(added)
    assert message in refused(tmp_path, path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.7])
def test_a_truncated_archive_is_one_line(tmp_path: Path, share: float) -> None:
    members = nemo_members(draw_tensors(SMALL), SMALL, tp=2)
    raw = write_nemo(tmp_path / "x.nemo", members).read_bytes()
    (tmp_path / "x.nemo").write_bytes(raw[: int(len(raw) * share)])
    assert re.search("truncated|unexpected end|is missing|holds no", refused(tmp_path, tmp_path / "x.nemo"))
