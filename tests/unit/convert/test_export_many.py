"""Exports that travel: the base's name, dtypes, many adapters in one call, bases that are found by their hashes; and
the commands that serve exports, as train, export and the docs show them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.flipped_bits import flip_bit
from support.folders import ROOT
from support.native_files import with_adapter, write_native
from support.run_files import edit_json
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.convert.export_peft import Export
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import import_peft, open_adapter
from megatron_tiedlora.convert.serving import serve_hints
from megatron_tiedlora.convert.verify import verify_export
from megatron_tiedlora.model.families import shape_from_hf

BASE = ModelSource("org/base", None, shape_from_hf(PRESETS["llama2-7b"]))
SHARED = replace(BASE, name="/shared/llama2-7b")
STABLE = replace(BASE, shape=shape_from_hf({"model_type": "stablelm"}))
VLLM = "# serve with vLLM 0.26 or later"
WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "tiedlora_export.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models of one shape, one of them as the hub's cache has it, and of other files."""
    root = tmp_path_factory.mktemp("models")
    write_tiny_model(root / "models--org--other/snapshots/0a1b", seed=1)
    write_tiny_model(root / "mine")
    (root / "broken").mkdir()
    (root / "broken/config.json").write_text("{")
    return root


@pytest.fixture(scope="module")
def adapters(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tl6/adapter, runs/lora/adapter and plain/, which has another layer."""
    root, base = tmp_path_factory.mktemp("adapters"), models / "mine"
    layers = {"runs/tl6/adapter": ("tl6", None), "runs/lora/adapter": ("lora", None), "plain": ("tl5", (2,))}
    for path, kind in layers.items():
        write_native(root / path, base, with_adapter(base, *kind)[2])
    return root


def content(folder: Path, file: str = CONFIG) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / file).read_text())
    return found


def test_the_base_is_named_without_its_path(models: Path, adapters: Path, tmp_path: Path) -> None:
    """The path stands beside it, where our own commands find it."""
    plain = str(adapters / "plain")
    assert call("export", ["--adapter", plain, "--output", str(tmp_path / "peft")]) == 0
    assert content(tmp_path / "peft")["base_model_name_or_path"] == "mine"
    assert content(tmp_path / "peft", RECORD)["base_path"] == str(models / "mine")
    assert open_adapter(str(tmp_path / "peft"), None).source.folder == models / "mine"
    assert call("export", ["--adapter", plain, "--output", str(tmp_path / "named"), "--base_name", "org/name"]) == 0
    assert content(tmp_path / "named")["base_model_name_or_path"] == "org/name"


def test_the_commands_that_serve_are_shown(
    adapters: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("export", ["--adapter", str(adapters / "plain"), "--output", str(tmp_path / "peft")])
    out = capsys.readouterr().out
    command = f"vllm serve {models / 'mine'} --enable-lora --max-lora-rank 8 --lora-target-modules qkv_proj"
    assert f"\n{command} --lora-modules tied={tmp_path / 'peft'}\n" in out
    resolver = "only for vLLM's filesystem resolver: the export names mine; export with --base_name"
    assert f"\n# {resolver} {models / 'mine'}\n" in out
    assert "sglang.launch_server" in out and "convert_lora_to_gguf.py" in out
    base = ["--base_name", str(models / "mine")]
    call("export", ["--adapter", str(adapters / "plain"), "--output", str(tmp_path / "named"), *base])
    assert "resolver" not in capsys.readouterr().out, "it finds this one"


# Dtypes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_an_export_in_16_bits(models: Path, adapters: Path, tmp_path: Path, dtype: str) -> None:
    """Its tensors are rounded once, the check knows their bits, and the import gives the adapter itself."""
    given, peft = adapters / "runs/tl6/adapter", tmp_path / "peft"
    call("export", ["--adapter", str(given), "--output", str(tmp_path / "exact")])
    call("export", ["--adapter", str(given), "--output", str(peft), "--dtype", dtype])
    exact, rounded = load_file(tmp_path / "exact" / WEIGHTS), load_file(peft / WEIGHTS)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert exact.keys() == rounded.keys()
    assert all(torch.equal(exact[name].to(kind), rounded[name]) for name in exact)
    opened = open_adapter(given, None)
    found = verify_export(opened.source, opened.adapter, peft=peft)
    rows = {row.name: row for row in found.logits}
    assert found.passed and [bits.differences for bits in found.bits] == [()] and not found.notes
    assert rows["PEFT adapter"].largest > 1e-6 and "information" in rows["PEFT adapter"].verdict
    assert rows["PEFT adapter, in peft"].largest < 1e-5 and rows["PEFT adapter, in peft"].wanted == "equal"
    import_peft(opened.source, peft, tmp_path / "back")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "back" / name).read_bytes() == (given / name).read_bytes()


def test_a_changed_bit_of_an_export_in_16_bits(adapters: Path, tmp_path: Path) -> None:
    given, peft = str(adapters / "runs/tl6/adapter"), tmp_path / "peft"
    call("export", ["--adapter", given, "--output", str(peft), "--dtype", "bf16"])
    assert call("verify", ["--adapter", given, "--peft", str(peft), "--in", "none"]) == 0
    flip_bit(peft / WEIGHTS, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    assert call("verify", ["--adapter", given, "--peft", str(peft), "--in", "none"]) == 1


def test_what_16_bits_do_not_hold_is_refused(models: Path, tmp_path: Path) -> None:
    _, _, oracle = with_adapter(models / "mine", "lora")
    oracle.B[:] = 1e5
    write_native(tmp_path / "large", models / "mine", oracle)
    words = ["--adapter", str(tmp_path / "large"), "--output", str(tmp_path / "peft")]
    said = refusal(call, "export", [*words, "--dtype", "fp16"])
    assert "lora_B.weight of its export has values that are not finite; give --dtype fp32" in said
    assert not (tmp_path / "peft").exists() and call("export", words) == 0


# Many adapters -------------------------------------------------------------------------------------------------------


def test_many_in_one_call(adapters: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(adapters / "runs/*/adapter"), str(adapters / "plain")]
    assert call("export", ["--adapter", *given, "--output", str(tmp_path / "all")]) == 0
    exported, plugin, by_name, vllm, resolver, serving = capsys.readouterr().out.splitlines()
    assert exported == f"exported 3 adapters: {tmp_path / 'all'}"
    assert plugin == "# serve by name with vLLM and this package's plugin, without exports"
    assert by_name == f"tiedlora serve --model {models / 'mine'} --adapters {tmp_path / 'all'}"
    assert call("serve", [*by_name.split()[2:], "--dry_run"]) == 0
    assert ": lora, plain and tl6\n" in capsys.readouterr().out
    assert vllm.startswith("# serve with vLLM 0.26 or later;")
    assert "resolver: the export names mine; export with --base_name" in resolver
    modules = " ".join(f"{name}={tmp_path / 'all' / name}" for name in ("lora", "tl6", "plain"))
    assert serving.endswith(f" --max-loras 3 --max-cpu-loras 3 --lora-modules {modules}")
    assert sorted(item.name for item in (tmp_path / "all").iterdir()) == ["lora", "plain", "tl6"]
    for name, folder in {"tl6": "runs/tl6/adapter", "lora": "runs/lora/adapter", "plain": "plain"}.items():
        call("export", ["--adapter", str(adapters / folder), "--output", str(tmp_path / "one" / name)])
        for file in (WEIGHTS, CONFIG, RECORD, f"native/{WEIGHTS}", f"native/{CONFIG}"):
            assert (tmp_path / "all" / name / file).read_bytes() == (tmp_path / "one" / name / file).read_bytes()


def test_a_pattern_is_many_whatever_it_matches_and_the_base_is_read_once(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_tiedlora.convert import export_peft as module

    seen: list[str] = []
    real = module.identify_model
    monkeypatch.setattr(module, "identify_model", lambda *words: seen.append("") or real(*words))
    call("export", ["--adapter", str(adapters / "runs/*/adapter"), "--output", str(tmp_path / "all")])
    assert len(seen) == 1
    call("export", ["--adapter", str(adapters / "pl*"), "--output", str(tmp_path / "one")])
    assert (tmp_path / "one/plain" / CONFIG).is_file()


WRONG_MANY = {
    "no match": (["runs/none*"], "--adapter runs/none*: matches no folder of an adapter"),
    "no adapter": (["plain", "runs"], "runs: has no adapter_config.json"),
    "one name": (["runs/*/adapter", "copy/tl6"], "would both be exported as tl6; rename one"),
    "there": (["plain", "runs/tl6/adapter"], "--output out: tl6 already exists"),
    "peft": (["plain", "exported"], "exported: this is already a PEFT adapter"),
    "rank": (["plain", "runs/tl6/adapter", "--pad_rank_to", "2"], "--pad_rank_to 2 is less than the adapter's rank 4"),
}


@pytest.mark.parametrize("case", WRONG_MANY)
def test_wrong_inputs_of_many(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    shutil.copytree(adapters, tmp_path, dirs_exist_ok=True)
    shutil.copytree(adapters / "plain", tmp_path / "copy/tl6")
    call("export", ["--adapter", str(adapters / "plain"), "--output", str(tmp_path / "exported")])
    monkeypatch.chdir(tmp_path)
    if case == "there":
        (tmp_path / "out/tl6").mkdir(parents=True)
    words, message = WRONG_MANY[case]
    assert message in refusal(call, "export", ["--adapter", *words, "--output", "out"])
    written = [item.name for item in tmp_path.glob("out/*") if any(item.iterdir())]
    assert written == (["plain"] if case in ("no adapter", "peft") else [])  # those before the error stay whole


# The base, by its hashes ---------------------------------------------------------------------------------------------


def test_a_base_is_found_among_models(models: Path, adapters: Path, tmp_path: Path) -> None:
    """The path that the adapter names is gone; another model of its shape lies before it."""
    shutil.copytree(models, tmp_path / "moved")
    folder, base = tmp_path / "adapter", tmp_path / "gone"
    shutil.copytree(models / "mine", base)
    write_native(folder, base, with_adapter(base, "tl6")[2])
    call("export", ["--adapter", str(folder), "--output", str(tmp_path / "peft")])
    shutil.rmtree(base)
    said = refusal(open_adapter, folder, None)
    assert "its base cannot be found; give it with --model, or a folder of models, where" in said
    moved, empty = str(tmp_path / "moved"), str(tmp_path / "empty")
    for given in (folder, tmp_path / "peft"):
        assert open_adapter(given, moved).source.folder == tmp_path / "moved/mine"
    shutil.rmtree(tmp_path / "moved/mine")
    said = refusal(open_adapter, folder, moved)
    assert f"moved: contains 2 models, but not the base of {folder}; give the base, or" in said
    (tmp_path / "empty/below").mkdir(parents=True)
    for kind in ("native", None):
        said = refusal(open_adapter, folder, empty, kind=kind)
        assert said.startswith(f"--model {empty}: has no config.json, and no models ") and "its hashes" in said


def test_a_peft_adapter_of_others_has_no_hashes(models: Path, adapters: Path, tmp_path: Path) -> None:
    call("export", ["--adapter", str(adapters / "plain"), "--output", str(tmp_path / "peft")])
    (tmp_path / "peft" / RECORD).unlink()
    said = refusal(open_adapter, tmp_path / "peft", str(models))
    assert "does not record its base's hashes; give the base's own folder" in said
    assert load_native_adapter(tmp_path / "peft/native").base_identity.base_model == str(models / "mine")


def test_a_peft_adapter_of_others_on_a_merged_model(models: Path, adapters: Path, tmp_path: Path) -> None:
    """It is rejected, unless the adapter's own config names that model, or the user insists."""
    peft, merged = tmp_path / "peft", tmp_path / "merged"
    call("export", ["--adapter", str(adapters / "plain"), "--output", str(peft)])
    (peft / RECORD).unlink()
    opened = open_adapter(adapters / "plain", None)
    merge_adapter(opened.source, opened.adapter, merged)
    said = refusal(open_adapter, peft, str(merged))
    assert "merged: an adapter is already merged into it; give the plain base with" in said
    assert any("names the base mine" in note for note in open_adapter(peft, str(merged), differs=True).notes)
    edit_json(peft / CONFIG, base_model_name_or_path=str(merged))
    found = open_adapter(peft, None)
    assert found.source.folder == merged and not any("names the base" in note for note in found.notes)


# The commands that serve them --------------------------------------------------------------------------------------


def one(rank: int, *targets: str, folder: str = "peft") -> dict[str, Export]:
    return {"tied": Export(Path(folder), rank, targets or ("qkv",))}


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (100, 128), (512, 512)])
def test_the_serve_command_allows_the_rank(rank: int, served: int) -> None:
    """A shell takes the lines as they stand: programs are named in comments."""
    lines = serve_hints(one(rank, "down_proj", "qkv", folder="out dir/peft"), BASE)
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
    for exports, source in ((one(513), BASE), (one(8), STABLE)):
        vllm, *rest = serve_hints(exports, source)
        assert vllm.startswith("# vLLM ") and "serve the merged model" in vllm
        others = "\n".join(rest)
        assert "sglang.launch_server --model-path org/base" in others and "convert_lora_to_gguf.py peft" in others
        assert "vllm serve" not in others
    several = {"a": Export(Path("a"), 8, ["qkv"]), "b": Export(Path("b"), 8, ["qkv"])}
    assert serve_hints(several, STABLE) == ["# vLLM has no LoRA for StableLM; serve the merged model instead"]
    huge = {name: export._replace(rank=513) for name, export in several.items()}
    (said,) = serve_hints(huge, BASE)
    assert said == "# vLLM accepts ranks up to 512; serve the merged model of a, b instead"


def test_one_command_serves_all_by_name() -> None:
    """With room for the largest rank that vLLM serves and for all targets; others are left out, which is said."""
    outputs = {
        "a": Export(Path("run/a/peft"), 3, ["qkv"]),
        "b": Export(Path("my run/b/peft"), 9, ["down_proj", "qkv"]),
        "huge": Export(Path("run/huge/peft"), 513, ["gate_up"]),
    }
    left_out, comment, command = serve_hints(outputs, BASE)
    assert left_out == "# vLLM accepts ranks up to 512; serve the merged model of huge instead"
    assert comment == f"{VLLM}; --max-loras: adapters in one batch, --max-cpu-loras: in host memory"
    assert command == (
        "vllm serve org/base --enable-lora --max-lora-rank 16 --lora-target-modules qkv_proj down_proj --max-loras 2"
        " --max-cpu-loras 2 --lora-modules a=run/a/peft 'b=my run/b/peft'"
    )
    of_one = serve_hints({name: outputs[name] for name in ("a", "huge")}, BASE)
    assert "--max-loras" not in of_one[-1], "one is served, and that is vLLM's default"
    many = {f"a{number}": Export(Path(f"a{number}"), 8, ["o_proj"]) for number in range(100)}
    assert " --max-loras 8 --max-cpu-loras 100 " in serve_hints(many, BASE)[-1], "no slot for each"


def test_the_name_that_vllm_s_resolver_asks_for_is_said_where_it_differs() -> None:
    lines = serve_hints(one(8), SHARED, named="llama2-7b")
    assert lines[1] == (
        "# only for vLLM's filesystem resolver: the export names llama2-7b; export with --base_name /shared/llama2-7b"
    )
    assert lines[2].startswith("vllm serve /shared/llama2-7b ")
    for named in ("/shared/llama2-7b", None):
        assert not any("resolver" in line for line in serve_hints(one(8), SHARED, named=named))


# Pages of the docs: what they show is what is printed. test_plan_command.py compares guide.md.


def block(page: str) -> list[str]:
    """The lines of the page's block that has the command of vLLM with LoRA."""
    text = (ROOT / page).read_text()
    (found,) = (part for part in re.split(r"\n\n", text) if part.startswith("    ") and "--enable-lora" in part)
    return [line.removeprefix("    ") for line in found.split("\n")]


def test_docs_of_one_and_of_several_exports() -> None:
    exports = one(16, *TARGET_NAMES, folder="RUN/peft-16")
    more: dict[str, Any] = {"named": "llama2-7b", "adapters": Path("RUN/peft-16")}
    assert block("docs/adapters.md") == serve_hints(exports, replace(SHARED, name="/models/llama2-7b"), **more)
    targets = {"support": ["qkv"], "legal": ["qkv"], "notes": TARGET_NAMES, "titles": ["qkv"]}
    ranks = {"legal": 16}
    exports = {name: Export(Path(f"runs/four/{name}/peft"), ranks.get(name, 8), of) for name, of in targets.items()}
    shown = serve_hints(exports, SHARED, adapters=Path("runs/four"))
    assert block("docs/many_adapters.md") == shown
