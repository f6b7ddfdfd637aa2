"""GPT-2B-001's `.nemo`, whole and split: the converted tensors, what transformers computes with them, what is refused.

The reference is a plain forward pass on NeMo's own tensors; see nemo_files.py, which shares no code with the converter.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from folders import ROOT
from nemo_files import (
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
from safetensors.torch import load_file

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.cli import run_command
from megatron_tiedlora.convert.nemo import convert_nemo
from megatron_tiedlora.convert.nemo_archive import NemoArchive
from megatron_tiedlora.convert.nemo_config import nemo_model
from megatron_tiedlora.data.tokenizer import load_tokenizer
from tools import convert_nemo as tool

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


def test_transformers_computes_what_the_plain_forward_pass_does(whole: Path) -> None:
    """And a wrong reading of the format is far from it."""
    tensors, batch = draw_tensors(), tokens()
    with torch.no_grad():
        found = load_stablelm(whole)(batch).logits
    expected = nemo_logits(tensors, batch)[..., : len_pieces()]
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-5 * largest
    for wrong in MISREADINGS:
        moved = nemo_logits(tensors, batch, wrong=wrong)[..., : len_pieces()]
        assert float((moved - expected).abs().max()) > 0.3 * largest, wrong


def test_shards_hold_the_same_tensors(whole: Path, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "whole.nemo", nemo_members(draw_tensors()))
    convert_nemo(nemo, tmp_path / "model", shard_bytes=40_000)
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
    found = NemoArchive(path).tensors("x.ckpt")
    assert list(found) == [PREFIX + name for name in content]
    for name, tensor in content.items():
        assert torch.equal(found[PREFIX + name], tensor) and found[PREFIX + name].dtype == tensor.dtype


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


def test_the_real_settings_give_the_real_number_of_parameters() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = nemo_model(GPT_2B_001, source="x").hf_config(vocab_size=256_000)
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_253_590_528
    assert (values["partial_rotary_factor"], values["max_position_embeddings"]) == (0.5, 4096)


# What is refused --------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, path: Path) -> str:
    """The one line, without the file's name, of a conversion that fails and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        convert_nemo(path, tmp_path / "model")
    assert sorted(tmp_path.rglob("*")) == before
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message) < 600 and "\n" not in message
    return message.removeprefix(f"{path}: ")


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
    with pytest.raises(UserError, match=rf"^here: {name} (= .* cannot be converted|is set)"):
        nemo_model(SMALL.settings(**{name: value}), source="here")


@pytest.mark.parametrize(("name", "value", "message"), [
    ("tensor_model_parallel_size", 4, "num_attention_heads = 2 cannot be converted: 2 is not a multiple of 4"),
    ("pipeline_model_parallel_size", 3, "num_layers = 2 cannot be converted: 2 is not a multiple of 3"),
    ("ffn_hidden_size", 25, "ffn_hidden_size = 25 cannot be converted: 25 is not a multiple of 2"),
])  # fmt: skip
def test_sizes_that_ranks_cannot_divide_are_named(name: str, value: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nemo_model(SMALL.settings(**{"tensor_model_parallel_size": 2, name: value}), source="here")


@pytest.mark.parametrize(
    "name", ["normalization", "activation", "position_embedding_type", "bias", "share_embeddings_and_output_weights"]
)
def test_a_setting_whose_absence_means_something_else_is_named(name: str) -> None:
    values = SMALL.settings()
    values.pop(name)
    with pytest.raises(UserError, match=f"here: {name} is absent, which cannot be converted"):
        nemo_model(values, source="here")


@pytest.mark.parametrize(
    ("name", "value"), [("library", "megatron"), ("sentencepiece_legacy", True), ("model", "/tokenizers/a.model")]
)
def test_another_tokenizer_is_named(name: str, value: Any) -> None:
    values = SMALL.settings()
    with pytest.raises(UserError, match=f"here: tokenizer: {name} = "):
        nemo_model({**values, "tokenizer": {**values["tokenizer"], name: value}}, source="here")


def test_numbers_in_another_notation_are_read() -> None:
    model = nemo_model(SMALL.settings(layernorm_epsilon="1e-6", rotary_percentage=1, kv_channels=8), source="here")
    assert (model.norm_eps, model.rotary_share, model.max_positions) == (1e-6, 1.0, 128)


class Hostile:
    """Runs a command where a pickle is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return written.getvalue()


def weights(change: Callable[[dict[str, Any]], object]) -> bytes:
    tensors: dict[str, Any] = draw_tensors(SMALL)
    change(tensors)
    return ckpt(state_dict(tensors))


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
    "no table": (lambda: ckpt((1, 2)), "is not a table"),
    "transposed": (lambda: weights(lambda t: t.update({_QKV: t[_QKV].T})), "is not stored row by row"),
    "missing": (lambda: weights(lambda t: t.pop(_QKV)), f"{_QKV} is missing"),
    "unknown": (lambda: weights(lambda t: t.update({"encoder.x.bias": t[_NORM]})), "holds 'encoder.x.bias'"),
    "shape": (lambda: weights(lambda t: t.update({_QKV: t[_QKV][1:].clone()})), "(47, 16), but (48, 16) is expected"),
    "width": (lambda: weights(lambda t: t.update({"output_layer.weight": t[_QKV].view(96, 8)})), "shape (96, 8)"),
    "few pieces": (lambda: weights(lambda t: t.update({"output_layer.weight": t[_QKV]})), "48 rows, but the tokenizer"),
    "base": (lambda: weights(lambda t: t["rotary_pos_emb.inv_freq"].mul_(0.9)), "inv_freq is not that of base 10000"),
    "nan": (lambda: weights(lambda t: t[_NORM].fill_(float("nan"))), "model.norm.weight holds numbers that are not"),
    "dtypes": (lambda: weights(lambda t: t.update({_QKV: t[_QKV].half()})), "float16 and float32"),
    "mcore": (lambda: ckpt(OrderedDict({"model.decoder.x": torch.ones(1)})), "(Megatron-Core's name)"),
    "other prefix": (lambda: ckpt(OrderedDict({"rm_head.weight": torch.ones(1)})), "holds 'rm_head.weight'"),
    "no zip": (lambda: b"no zip", "File is not a zip file"),
    "cut zip": (lambda: weights(str)[:-5000], "is not a zip"),
    "compressed": (lambda: zipped({"data.pkl": b"\x80\x02}." * 99}, zipfile.ZIP_DEFLATED), "is compressed"),
    "no pickle": (lambda: zipped({"x": b""}), "cannot be read as a state dict"),
    "big endian": (lambda: zipped({"data.pkl": b"\x80\x02}.", "byteorder": b"big"}), "byte order"),
    "values cut": (lambda: values_cut(weights(str)), "are missing, or too few"),
    "operation": (lambda: zipped({"data.pkl": b"\x80\x02]."}), "the operation EMPTY_LIST"),
    "calls text": (lambda: zipped({"data.pkl": b"\x80\x02X\x01\x00\x00\x00a)R."}), "calls what is not a function"),
    "deep": (lambda: zipped({"data.pkl": b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s."}), "a name is not text"),
    "pickle cut": (lambda: zipped({"data.pkl": b"\x80\x02}"}), "pickle exhausted before seeing STOP"),
    "memo": (lambda: zipped({"data.pkl": b"\x80\x02}r\xff\xff\xff\xff."}), "is missing"),
    "huge pickle": (lambda: zipped({"data.pkl": b"\x80\x02}" + b"0" * 2**24}), "bytes where at most"),
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
    (lambda: changed(lambda m: m.update({"../evil": b""})), "the name './../evil' leads out of it"),
])  # fmt: skip
def test_another_archive_is_one_line(tmp_path: Path, make: Callable[[], dict[str, bytes]], message: str) -> None:
    assert message in refused(tmp_path, write_nemo(tmp_path / "x.nemo", make()))


@pytest.mark.parametrize(("kind", "message"), [
    ("absolute", "'/model_config.yaml' leads out of it"), ("gzip", "gzip -dc"), ("xz", "cannot be read as a .nemo"),
    (tarfile.SYMTYPE, "'link' is not a plain file"), (tarfile.LNKTYPE, "'link' is not a plain file"),
    (tarfile.FIFOTYPE, "'link' is not a plain file"), ("twice", "holds 'model_config.yaml' twice"),
    ("empty", "cannot be read as a .nemo"), ("folder", "Is a directory"), ("long name", "bytes of names"),
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


# The command ------------------------------------------------------------------------------------------------------


def run_tool(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        run_command(tool.main, [str(argument) for argument in arguments])
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


def test_help_reads_without_loading_anything() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "tools" / "convert_nemo.py"), "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--nemo FILE" in result.stdout and "--output DIR" in result.stdout and " torch\n" not in result.stderr
    assert max(len(line) for line in result.stdout.splitlines()) <= 120
