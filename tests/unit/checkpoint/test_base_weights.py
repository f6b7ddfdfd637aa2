"""Base weights out of safetensors, with and without an adapter merged into them: every layout and dtype, every kind of
damage, and the memory that reading takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from support.native_files import with_adapter
from support.oracle import OracleConfig, load_weights, merged_weights, oracle_logits
from support.run_files import edit_json, edit_tensors, truncate
from support.task_files import refusal
from support.tiny_models import write_tiny_model
from support.wide_models import peak_of
from torch.testing import assert_close

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, RandomWeights, load_base_weights
from megatron_tiedlora.checkpoint.load_model import MergedWeights, load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.weights import stage_weight_rules, stored_shapes, weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, frozen_weights
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, RankGroup

INDEX = "model.safetensors.index.json"
NORM = "model.layers.1.input_layernorm.weight"


def tiny(folder: Path, *, sharded: bool = False, **keywords: object) -> Path:
    size = "30KB" if sharded else None
    return write_tiny_model(folder, tokenizer=False, max_shard_size=size, attention_bias=True, **keywords)


# --------------------------------------------------------------------------------------- what is downloaded


def test_a_second_copy_of_the_weights_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral's repositories have all weights twice; transformers does not read `consolidated.safetensors`."""
    files = ["config.json", "model-00001-of-00002.safetensors", "README.md", "consolidated.safetensors", "a.md",
             "consolidated-00001-of-00002.safetensors", "consolidated.safetensors.index.json"]  # fmt: skip
    wanted: list[str] = []

    def download(name: str, **patterns: list[str]) -> str:
        wanted.extend(huggingface_hub.utils.filter_repo_objects(files, **patterns))
        return str(tiny(tmp_path / "model"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("mistralai/model").from_hub
    assert wanted == files[:3], "and the card, which has the licence"


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
    load_base_weights(RandomWeights(rules), targets, group=RankGroup(None, 1, 2))
    for rule in rules:
        drawn = parameters[rule.name]
        if len(rule.shape) == 1:
            assert bool((drawn == (0 if rule.name.endswith("bias") else 1)).all())
        else:
            assert float(drawn.std()) == pytest.approx(rule.shape[-1] ** -0.5, rel=0.1)
    assert torch.equal(parameters["layers.0.weight"], parameters[rules[-1].name])
    before = parameters["layers.0.weight"].clone()
    load_base_weights(RandomWeights(rules), targets, group=RankGroup(None, 0, 2))
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


@pytest.mark.parametrize(("tp_size", "stored"), [(1, torch.float32), (2, torch.float32), (1, torch.bfloat16)])
def test_a_rank_reads_its_part_and_no_more(tmp_path: Path, tp_size: int, stored: torch.dtype) -> None:
    """What ranks read joins to the whole; cut tensors are read once over all ranks, the others once by each. Bytes are
    those that are stored."""
    folder = tiny(tmp_path, dtype=stored)
    source = find_model(str(folder))
    rules, whole = weight_rules(source.shape), load_weights(folder)
    for rule in rules:
        parts = []
        with BaseWeights(folder, source.shape) as weights:
            for rank in range(tp_size):
                parts.append(torch.empty(rule.spec.local_shape(rule.shape, tp_size)))
                weights.fill(rule, FrozenWeight(parts[-1]), RankGroup(None, rank, tp_size))
            times = tp_size if rule.spec.dim is None else 1
            assert weights.bytes_read == times * stored.itemsize * torch.Size(rule.shape).numel()
        expected = torch.cat([whole[name] for name in rule.hf_names]).float()
        assert torch.equal(rule.spec.join(parts), expected), rule.name


@torch.no_grad()
def test_a_head_beside_a_tied_embedding_is_not_read(tmp_path: Path) -> None:
    """Some checkpoints store the tied head too. (Where it is another one, transformers ties nothing: it is refused.)"""
    folder = write_tiny_model(tmp_path, tokenizer=False, tied=True)
    weights = load_weights(folder)
    embedding = "model.embed_tokens.weight"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    ids = torch.arange(3, 33)[None]
    ours = load_model(find_model(str(folder)), None, dtype=torch.float32).predict(ids, torch.arange(30)[None])
    theirs = oracle_logits(weights, OracleConfig.from_folder(folder), None, ids)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# --------------------------------------------------------------------------------------------- with an adapter merged


def test_a_slice_has_the_values_of_the_whole(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path, tokenizer=False)
    source, adapter, oracle = with_adapter(base, "tl6", (1, 3), targets=TARGET_NAMES)
    wanted = merged_weights(load_weights(base), OracleConfig.from_folder(base), oracle)
    with MergedWeights(source, adapter) as weights:
        assert len(weights.changed) == 2 * 7
        for name in sorted(weights.changed):
            rows, columns = wanted[name].shape
            assert_close(weights.read(name), wanted[name], rtol=1e-6, atol=1e-6)
            for part, dim in ((slice(5, rows - 3), 0), (slice(7, columns - 2), 1)):
                own = wanted[name][part] if dim == 0 else wanted[name][:, part]
                assert_close(weights.read(name, part, dim), own, rtol=1e-6, atol=1e-6)
            assert torch.equal(weights.read_base(name, slice(0, rows)), load_weights(base)[name])


def test_every_rank_loads_its_shards_of_the_merged_model(tmp_path: Path) -> None:
    """Rows of QKV, gate and up, columns of the others."""
    source, adapter, _ = with_adapter(write_tiny_model(tmp_path, tokenizer=False), "tl6", targets=TARGET_NAMES)
    whole = frozen_weights(load_model(source, adapter, dtype=torch.float32, merged=True))
    plain = frozen_weights(load_model(source, None, dtype=torch.float32))
    layouts = [(Grid(rank, 2, tp_size=2), ParallelGroups(tensor=RankGroup(None, rank, 2))) for rank in range(2)]
    ranks = [
        frozen_weights(load_model(source, adapter, dtype=torch.float32, grid=grid, groups=groups, merged=True))
        for grid, groups in layouts
    ]
    changed = 0
    with MergedWeights(source, None) as weights:
        for rule in weights.rules:
            full, own = (next(iter(frozen[rule.name].parameters.values())) for frozen in (whole, plain))
            changed += not torch.equal(full, own)
            for rank, frozen in enumerate(ranks):
                (shard,) = frozen[rule.name].parameters.values()
                assert_close(shard, rule.spec.split(full, rank, 2), rtol=1e-6, atol=1e-6)
    assert changed == 3 * 4


# --------------------------------------------------------------------------------------------- what is refused


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


def map_norm_to(file: object, folder: Path) -> None:
    """Let the index name another file for NORM; None: another one of the folder."""
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(one for one in names.values() if one != names[NORM])
    edit_json(folder / INDEX, weight_map={**names, NORM: other if file is None else file})


def move_outside(folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes(last_shard(folder).read_bytes())
    map_norm_to("../outside.safetensors", folder)


def spoil_header(folder: Path) -> None:
    content = last_shard(folder).read_bytes()
    last_shard(folder).write_bytes(content[:8] + b"\x00" * 32 + content[40:])


def retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / "model.safetensors", change)


def write_index(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


KEYS = "model.layers.0.self_attn.k_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
# What is done to a folder of one file or of several, and what is said of it; {file}: the last file of weights.
SINGLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: truncate(last_shard(f)), "{file}"),
    "empty": (lambda f: last_shard(f).write_bytes(b""), "{file}"),
    "header": (spoil_header, "{file}"),
    "pointer": (lambda f: last_shard(f).write_text(LFS), "{file}"),
    "tensor missing": (retensor(lambda t: t.pop(NORM)), NORM),
    "shape": (
        retensor(lambda t: t.update({KEYS: torch.zeros(32, 32)})),
        f"{KEYS} has shape (32, 32), but config.json requires (16, 32)",
    ),
    "integers": (retensor(lambda t: t.update({KEYS: t[KEYS].to(torch.int8)})), f"{KEYS} is I8"),
    "pickled": (lambda f: last_shard(f).rename(f / "pytorch_model.bin"), "found pytorch_model.bin"),
    "nothing": (lambda f: last_shard(f).unlink(), "has neither model.safetensors nor"),
}
SHARDED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": SINGLE["truncated"],
    "header": SINGLE["header"],
    "file missing": (lambda f: last_shard(f).unlink(), f"{{file}}: no such file, but {INDEX} names it"),
    "outside": (move_outside, "names a file outside its folder"),
    "absolute": (lambda f: map_norm_to(str(f.parent / "outside.safetensors"), f), "names a file outside its folder"),
    "another file": (lambda f: map_norm_to(None, f), NORM),
    "index no JSON": (write_index("{"), "not valid JSON"),
    "no map": (write_index('{"metadata": {}}'), "not a safetensors index"),
    "map of numbers": (lambda f: map_norm_to(3, f), "not a safetensors index"),
}


@pytest.mark.parametrize(
    ("sharded", "case"), [*((False, case) for case in SINGLE), *((True, case) for case in SHARDED)]
)
def test_a_damaged_model_is_one_line_that_names_it(tmp_path: Path, sharded: bool, case: str) -> None:
    folder = tiny(tmp_path / "model", sharded=sharded)
    damage, message = (SHARDED if sharded else SINGLE)[case]
    wanted = message.format(file=last_shard(folder).name)
    damage(folder)
    said = refusal(load_model, find_model(str(folder)), None, dtype=torch.float32)
    assert wanted in said and str(folder) in said


def test_a_damaged_config_or_no_model_is_one_line_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    assert refusal(find_model, str(tmp_path)).startswith(f"{file}: no such file")
    wrong = {b"{": "not valid JSON", b"\xff\xfe": "not valid JSON", b"[]": "expected a JSON object"}
    for content, message in wrong.items():
        file.write_bytes(content)
        assert refusal(find_model, str(tmp_path)).startswith(f"{file}: {message}")
    assert "no such folder" in refusal(find_model, str(tmp_path / "none"))
    assert "is a file; give the folder" in refusal(find_model, str(file))
    assert "shape without weights" in refusal(load_model, find_model("llama2-7b"), None, dtype=torch.bfloat16)


# --------------------------------------------------------------------------------------------- memory

# A small model first: code and threads are in place.
SMALL_FIRST = """
import torch
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model

def load(folder):
    return load_model(find_model(folder), None, dtype=torch.bfloat16)

load(sys.argv[2])
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize("stored", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float32], ids=str)
def test_reading_takes_the_memory_of_the_model_and_one_tensor(tmp_path: Path, stored: torch.dtype) -> None:
    """Peak anonymous memory while a model is read in bf16.

    The bound: the model itself, one stored tensor on its way (the largest: an embedding, here an eighth of the model
    or, stored in fp32, a quarter; versions of safetensors that give file pages need none), and a twelfth of the model
    for the allocator and the index. Building the Hugging Face model first would take 190 or 380 MB on top.
    """
    small = write_tiny_model(tmp_path / "small", tokenizer=False, num_layers=1)
    large = shutil.copytree(small, tmp_path / "large")
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "vocab_size": 16000}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    edit_json(large / "config.json", **sizes, **heads)
    source = find_model(str(large))
    shapes = stored_shapes(weight_rules(source.shape))
    save_file({name: torch.ones(shape, dtype=stored) for name, shape in shapes.items()}, large / "model.safetensors")
    largest = max(torch.Size(shape).numel() for shape in shapes.values()) * stored.itemsize
    _, start, most, samples = peak_of(SMALL_FIRST, "model = load(sys.argv[1])", large, small)
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    grown = most - start
    assert 180e6 < size < 220e6 and samples > 10
    assert grown > 0.95 * size  # the measurement sees the model
    assert grown <= size + largest + size // 12
