"""What of a `.nemo` is refused: settings that compute something else, broken and hostile archives. In one line each."""

from __future__ import annotations

import io
import os
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo_files import TOKENIZER, Sizes, ckpt, draw_tensors, nemo_members, pieces, rank_member, state_dict, write_nemo
from task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.convert.nemo import convert_nemo, nemo_model

SMALL = Sizes(layers=2, hidden=16, ffn=24, heads=2)

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
    with pytest.raises(UserError, match=rf"^here: {name} (= .* cannot be converted|is set)"):
        nemo_model(SMALL.settings(**{name: value}), source="here")


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
    assert refusal(lambda: nemo_model(values, source="here")).startswith(f"here: {message}")


def test_numbers_in_another_notation_are_read() -> None:
    model = nemo_model(SMALL.settings(layernorm_epsilon="1e-6", rotary_percentage=1, kv_channels=8), source="here")
    assert (model.norm_eps, model.rotary_share, model.max_positions) == (1e-6, 1.0, 128)


# Archives ------------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, path: Path) -> str:
    """The one line, without the file's name, of a conversion that fails and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        convert_nemo(path, tmp_path / "model")
    assert sorted(tmp_path.rglob("*")) == before
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message) < 600 and "\n" not in message
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
    "no table": (lambda: ckpt((1, 2)), "is not a table"),
    "transposed": (lambda: weights(lambda t: t.update({_QKV: t[_QKV].T})), "is not stored row by row"),
    "missing": (lambda: weights(lambda t: t.pop(_QKV)), f"{_QKV} is missing"),
    "unknown": (lambda: weights(lambda t: t.update({"encoder.x.bias": t[_NORM]})), "a tensor 'encoder.x.bias'"),
    "shape": (lambda: weights(lambda t: t.update({_QKV: t[_QKV][1:].clone()})), "(47, 16), expected (48, 16)"),
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
    "calls text": (lambda: zipped({"data.pkl": b"\x80\x02X\x01\x00\x00\x00a)R."}), "not that of a state dict"),
    "deep": (lambda: zipped({"data.pkl": b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s."}), "more than 20,000 tuples"),
    "less deep": (lambda: zipped({"data.pkl": b"\x80\x02})" + b"\x85" * 20_000 + b"K\x01s."}), "a name is not text"),
    # Each level has the one before twice, so that the hash of the last one never ends.
    "wide": (lambda: zipped({"data.pkl": b"\x80\x02})q\0" + b"h\0h\0\x86q\0" * 99 + b"K\x01s."}), "uses a tuple twice"),
    "hidden tuple": (lambda: zipped({"data.pkl": b"\x80\x02}K\x01\x85(uq\0h\0\x86K\x01s."}), "uses a tuple twice"),
    "two pickles": (lambda: twice(weights(str)), "holds a file twice"),
    "pickle cut": (lambda: zipped({"data.pkl": b"\x80\x02}"}), "pickle exhausted before seeing STOP"),
    "memo": (lambda: zipped({"data.pkl": b"\x80\x02}r\xff\xff\xff\xff."}), "is missing"),
    "many axes": (lambda: weights(lambda t: t.update(x=torch.ones([1] * 9))), "tensor 'x' that does not belong there"),
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
    (lambda: changed(lambda m: m.update({TOKENIZER: pieces(treat_whitespace_as_suffix=True)})), "gives other ids for"),
    (lambda: changed(lambda m: m.update({"../evil": b""})), "the name './../evil' leads out of it"),
])  # fmt: skip
def test_another_archive_is_one_line(tmp_path: Path, make: Callable[[], dict[str, bytes]], message: str) -> None:
    assert message in refused(tmp_path, write_nemo(tmp_path / "x.nemo", make()))


@pytest.mark.parametrize(("kind", "message"), [
    ("absolute", "'/model_config.yaml' leads out of it"), ("gzip", "gzip -dc"), ("xz", "cannot be read as a .nemo"),
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
