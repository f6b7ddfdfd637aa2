"""Base weights out of safetensors: every layout and dtype, every kind of damage, and the memory that reading takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import ROOT
from oracle import OracleConfig, load_weights, oracle_logits
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, RandomWeights, load_base_weights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.weights import stage_weight_rules, stored_shapes, weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight

INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"


def tiny(folder: Path, *, sharded: bool = False, **keywords: object) -> Path:
    return write_tiny_model(
        folder, tokenizer=False, max_shard_size="30KB" if sharded else None, attention_bias=True, **keywords
    )


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------- what is drawn


def test_random_weights_keep_activations_at_their_size(tmp_path: Path) -> None:
    """Norms are one and biases zero; for a matrix its full width counts, and a copied embedding is a copy."""
    source = find_model(str(tiny(tmp_path, tied=True)))
    rules = stage_weight_rules(source.shape, has_embedding=False)
    tp_size, parameters = 2, {}
    for rule in rules:
        local = torch.full(rule.spec.local_shape(rule.shape, tp_size), float("nan"))
        parameters[rule.name] = torch.nn.Parameter(local, requires_grad=False)
    targets = {name: FrozenWeight(parameter) for name, parameter in parameters.items()}
    load_base_weights(RandomWeights(rules), targets, tp_rank=1)
    for rule in rules:
        drawn = parameters[rule.name]
        if len(rule.shape) == 1:
            assert bool((drawn == (0 if rule.name.endswith("bias") else 1)).all())
        else:
            assert float(drawn.std()) == pytest.approx(rule.shape[-1] ** -0.5, rel=0.1)
    assert torch.equal(parameters["layers.0.weight"], parameters[rules[-1].name])
    before = parameters["layers.0.weight"].clone()
    load_base_weights(RandomWeights(rules), targets, tp_rank=0)
    assert not torch.equal(before, parameters["layers.0.weight"]), "ranks have different parts"


# --------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_every_parameter_is_the_stored_tensor_cast_once(
    tmp_path: Path, sharded: bool, stored: torch.dtype, target: torch.dtype
) -> None:
    folder = tiny(tmp_path, sharded=sharded, dtype=stored)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == sharded == (folder / INDEX).exists()
    source, weights = find_model(str(folder)), load_weights(folder)
    assert weights[NORM].dtype == stored
    parameters = dict(load_model(source, None, dtype=target).named_parameters())
    rules = weight_rules(source.shape)
    assert parameters.keys() == {rule.name for rule in rules}
    for rule in rules:
        expected = torch.cat([weights[name] for name in rule.hf_names]).to(target)
        assert parameters[rule.name].dtype == target and not parameters[rule.name].requires_grad
        assert torch.equal(parameters[rule.name], expected), rule.name


def test_bytes_read_are_the_stored_bytes(tmp_path: Path) -> None:
    folder = tiny(tmp_path, dtype=torch.bfloat16)
    source = find_model(str(folder))
    with BaseWeights(folder, source.shape) as weights:
        for rule in weights.rules:
            weights.fill(rule, FrozenWeight(torch.empty(rule.shape)))
        assert weights.bytes_read == sum(
            t.numel() * t.element_size() for t in load_file(next(folder.glob("*.saf*"))).values()
        )


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_rank_reads_its_part_and_no_more(tmp_path: Path, tp_size: int) -> None:
    """What ranks read joins to the whole; cut tensors are read once over all ranks, the others once by each."""
    folder = tiny(tmp_path)
    source = find_model(str(folder))
    rules, whole = weight_rules(source.shape), load_weights(folder)
    for rule in rules:
        parts = []
        with BaseWeights(folder, source.shape) as weights:
            for rank in range(tp_size):
                parts.append(torch.empty(rule.spec.local_shape(rule.shape, tp_size)))
                weights.fill(rule, FrozenWeight(parts[-1]), tp_rank=rank, tp_size=tp_size)
            times = tp_size if rule.spec.dim is None else 1
            assert weights.bytes_read == times * 4 * torch.Size(rule.shape).numel()
        assert torch.equal(rule.spec.join(parts), torch.cat([whole[name] for name in rule.hf_names])), rule.name


@torch.no_grad()
def test_a_head_beside_a_tied_embedding_is_not_read(tmp_path: Path) -> None:
    """Some checkpoints store the tied head too. (Where it is another one, transformers ties nothing: it is refused.)"""
    folder = write_tiny_model(tmp_path, tokenizer=False, tied=True)
    weights = load_weights(folder)
    embedding = "model.embed_tokens.weight"
    rewrite(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    ids = torch.arange(3, 33)[None]
    ours = load_model(find_model(str(folder)), None, dtype=torch.float32).predict(ids, torch.arange(30)[None])
    theirs = oracle_logits(weights, OracleConfig.from_folder(folder), None, ids)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# --------------------------------------------------------------------------------------------- what is refused


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def truncated(folder: Path) -> str:
    file = last_shard(folder)
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def empty(folder: Path) -> str:
    last_shard(folder).write_bytes(b"")
    return last_shard(folder).name


def corrupt_header(folder: Path) -> str:
    file = last_shard(folder)
    content = bytearray(file.read_bytes())
    content[8:40] = b"\x00" * 32
    file.write_bytes(content)
    return file.name


def lfs_pointer(folder: Path) -> str:
    last_shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    return last_shard(folder).name


def tensor_missing(folder: Path) -> str:
    file = folder / "model.safetensors"
    rewrite(file, lambda tensors: tensors.pop(NORM))
    return NORM


def wrong_shape(folder: Path) -> str:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder / "model.safetensors", lambda t: t.update({name: torch.zeros(32, 32)}))
    return f"{name} has shape (32, 32), but config.json makes it (16, 32)"


def quantised(folder: Path) -> str:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder / "model.safetensors", lambda t: t.update({name: t[name].to(torch.int8)}))
    return f"{name} is I8"


def pickled_only(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "found pytorch_model.bin"


def nothing(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "has neither model.safetensors nor"


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def file_missing(folder: Path) -> str:
    last_shard(folder).unlink()
    return "no such file, but model.safetensors.index.json names it"


def index_outside(folder: Path) -> str:
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(last_shard(folder).read_bytes())
    edit_index(folder, lambda names: names.update({NORM: "../outside.safetensors"}))
    return "names a file outside its folder"


def index_absolute(folder: Path) -> str:
    edit_index(folder, lambda names: names.update({NORM: str(folder.parent / "outside.safetensors")}))
    return "names a file outside its folder"


def index_names_another_file(folder: Path) -> str:
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(file for file in names.values() if file != names[NORM])
    edit_index(folder, lambda names: names.update({NORM: other}))
    return NORM


def index_is_not_json(folder: Path) -> str:
    (folder / INDEX).write_text("{")
    return "not valid JSON"


def index_without_map(folder: Path) -> str:
    (folder / INDEX).write_text('{"metadata": {}}')
    return "not a safetensors index"


def index_of_numbers(folder: Path) -> str:
    edit_index(folder, lambda names: names.update({NORM: 3}))  # type: ignore[dict-item]
    return "not a safetensors index"


SINGLE = [truncated, empty, corrupt_header, lfs_pointer, tensor_missing, wrong_shape, quantised, pickled_only, nothing]
SHARDED = [
    truncated,
    corrupt_header,
    file_missing,
    index_outside,
    index_absolute,
    index_names_another_file,
    index_is_not_json,
    index_without_map,
    index_of_numbers,
]


@pytest.mark.parametrize(
    ("sharded", "damage"),
    [pytest.param(sharded, d, id=f"{kind}-{d.__name__}") for sharded, kind, all_ in
     ((False, "single", SINGLE), (True, "sharded", SHARDED)) for d in all_],
)  # fmt: skip
def test_a_damaged_model_is_one_line_that_names_it(
    tmp_path: Path, sharded: bool, damage: Callable[[Path], str]
) -> None:
    folder = tiny(tmp_path / "model", sharded=sharded)
    message = damage(folder)
    with pytest.raises(UserError) as error:
        load_model(find_model(str(folder)), None, dtype=torch.float32)
    assert message in str(error.value)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no such file"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"\xff\xfe", "not valid JSON"),
        ("config.json", b"[]", "expected a JSON object"),
    ],
)
def test_a_damaged_config_is_one_line_that_names_it(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = tiny(tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        find_model(str(folder))
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        find_model(str(tmp_path / "none"))
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; give the folder"):
        find_model(str(tmp_path / "file.safetensors"))
    with pytest.raises(UserError, match="shape without weights"):
        load_model(find_model("llama2-7b"), None, dtype=torch.bfloat16)


# --------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, threading
from pathlib import Path
import torch
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model

torch.set_num_threads(1)

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

load_model(find_model(sys.argv[2]), None, dtype=torch.bfloat16)  # a small one first: code and threads are in place
done, start = threading.Event(), anonymous()
seen = [start]
thread = threading.Thread(target=watch)
thread.start()
model = load_model(find_model(sys.argv[1]), None, dtype=torch.bfloat16)
seen.append(anonymous())
done.set(), thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, max(seen) - start, len(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_reading_takes_the_memory_of_the_model_and_one_tensor(tmp_path: Path, stored: torch.dtype) -> None:
    """Peak anonymous memory while a model is read in bf16.

    The bound: the model itself, one stored tensor on its way (the largest: an embedding, here an eighth of the model
    or, stored in fp32, a quarter; versions of safetensors that give file pages need none), and a twelfth of the model
    for the allocator and the index. Building the Hugging Face model first would take 190 or 380 MB on top.
    """
    small = write_tiny_model(tmp_path / "small", tokenizer=False, num_layers=1)
    large = tmp_path / "large"
    large.mkdir()
    config = json.loads((small / "config.json").read_text())
    config |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 16000}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    (large / "config.json").write_text(json.dumps(config))
    source = find_model(str(large))
    shapes = stored_shapes(weight_rules(source.shape))
    save_file({name: torch.ones(shape, dtype=stored) for name, shape in shapes.items()}, large / "model.safetensors")
    largest = max(torch.Size(shape).numel() for shape in shapes.values()) * stored.itemsize
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), str(small)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    size, grown, samples = (int(word) for word in output.split())
    assert 180e6 < size < 220e6 and samples > 10
    assert grown > 0.95 * size  # the measurement sees the model
    assert grown <= size + largest + size // 12
