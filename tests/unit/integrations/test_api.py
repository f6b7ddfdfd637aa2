"""The Python interface: adapters on transformers' models, training in this process, what is rejected, and that it loads
nothing before use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.folders import python
from support.peft_models import hf_model, logits_of, write_adapter, write_bases
from support.tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM

import megatron_tiedlora as tiedlora
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.peft import TiedLoraConfig, TiedLoraLinear


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_attached_is_the_export_and_detached_is_the_base(
    bases: dict[str, Path], tmp_path: Path, method: str, family: str
) -> None:
    base = bases[family]
    native = write_adapter(tmp_path / "native", base, method, "all")
    export_peft(find_model(str(base)), native, tmp_path / "peft")
    adapter = tiedlora.load_adapter(tmp_path / "native")
    model = hf_model(base)
    plain, names = logits_of(model), list(model.state_dict())
    assert tiedlora.attach(model, adapter) is model
    attached = logits_of(model)
    assert torch.equal(attached, logits_of(PeftModel.from_pretrained(hf_model(base), tmp_path / "peft")))
    assert list(model.state_dict()) == names and (attached - plain).abs().max() > 0.05
    assert torch.equal(logits_of(tiedlora.detach(model)), plain)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_has_the_bits_of_the_merged_folder(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype, family: str
) -> None:
    """Merged directly, after it was attached, and by PEFT."""
    native = write_adapter(tmp_path / "native", bases[family], targets="all")
    hf_model(bases[family], dtype).save_pretrained(tmp_path / "base")
    merge_adapter(find_model(str(tmp_path / "base")), native, tmp_path / "merged", tokenizer=str(bases[family]))
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    ours = tiedlora.merge(hf_model(bases[family], dtype), native)
    attached = tiedlora.merge(tiedlora.attach(hf_model(bases[family], dtype), native))
    by_peft = [
        PeftModel.from_pretrained(hf_model(bases[family], dtype), tmp_path / "native").merge_and_unload(safe_merge=safe)
        for safe in (False, True)
    ]
    for model in (ours, attached, *by_peft):
        found = model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert not any(isinstance(module, TiedLoraLinear) for module in model.modules())
    for model in (ours, attached):
        with pytest.raises(tiedlora.UserError, match="an adapter is already merged into the model; load the model"):
            tiedlora.attach(model, native)


def test_five_lines_load_an_adapter_and_generate(bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tmp_path / "native", bases["llama"], targets="all", scale=1.0)
    adapter = tiedlora.load_adapter(tmp_path / "native")
    model = tiedlora.attach(tiedlora.load_base(adapter), adapter)
    answer = tiedlora.generate(model, "The sky is", max_new_tokens=12)
    merged = tiedlora.merge(tiedlora.load_base(adapter), adapter)
    several = tiedlora.generate(merged, ["The sky is", "Another"], max_new_tokens=12)
    assert several[0] == answer and len(several) == 2
    assert answer != tiedlora.generate(tiedlora.detach(model), "The sky is", max_new_tokens=12)


def test_samples_are_repeatable_and_leave_the_random_state(bases: dict[str, Path]) -> None:
    """They are transformers' own, whatever its defaults and the model's."""
    model = hf_model(bases["llama"])
    state = torch.get_rng_state()
    how: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3}
    answers = tiedlora.generate(model, ["The sky is"] * 2 + ["Another"], **how)
    assert torch.equal(torch.get_rng_state(), state) and len(set(answers)) == 3 and torch.rand(9).any()
    assert tiedlora.generate(model, "The sky is", **how) == answers[0]
    assert tiedlora.generate(model, "The sky is", **{**how, "seed": 4}) != answers[0]
    greedy = tiedlora.generate(model, "The sky is", max_new_tokens=12, seed=3)
    assert greedy == tiedlora.generate(model, "The sky is", **how, top_p=1e-6) != answers[0]
    given: dict[str, Any] = {}
    model.generate = lambda tokens, **options: given.update(options) or tokens
    tiedlora.generate(model, "The sky is", temperature=2, top_p=0.5, num_beams=3)
    chosen = {"do_sample": True, "temperature": 2.0, "top_p": 0.5, "top_k": 0, "num_beams": 3, "max_new_tokens": 256}
    assert chosen.items() <= given.items()
    more: Any
    for more in ({}, {"do_sample": False}):
        with pytest.raises(tiedlora.UserError, match=r"--top_p 0\.5 needs --temperature above 0"):
            tiedlora.generate(model, "The sky is", top_p=0.5, **more)
    for more, wanted in (({}, set()), ({"top_p": 0.9}, {("top_p", 0.9)})):  # else as in the model's generation config
        given.clear()
        tiedlora.generate(model, "The sky is", do_sample=True, **more)
        assert {(name, given.get(name)) for name in ("temperature", "top_p", "top_k") if name in given} == wanted
        assert given["do_sample"]


def test_what_does_not_fit_is_one_line(bases: dict[str, Path], tmp_path: Path) -> None:
    native = write_adapter(tmp_path / "native", bases["llama"])
    model = tiedlora.attach(hf_model(bases["llama"]), native)
    with pytest.raises(tiedlora.UserError, match=r"the model already has an adapter; call detach\(model\) first"):
        tiedlora.attach(model, native)
    tiedlora.detach(model)
    with pytest.raises(tiedlora.UserError, match=r"no attached adapter; call attach\(model, adapter\) first"):
        tiedlora.detach(model)
    other = hf_model(write_tiny_model(tmp_path / "other", head_dim=12, seed=1))
    with pytest.raises(tiedlora.UserError, match=r"whose weights differ from .*'s; use its own base, or give base_d"):
        tiedlora.attach(other, native)
    tiedlora.detach(tiedlora.attach(other, native, base_differs=True))
    with pytest.raises(tiedlora.UserError, match="has 8; use its own base"):
        tiedlora.attach(hf_model(bases["phi3"]), native, base_differs=True)
    with pytest.raises(tiedlora.UserError, match="Linear is not a transformers model"):
        tiedlora.attach(torch.nn.Linear(2, 2), native)
    with pytest.raises(tiedlora.UserError, match=r"the model has no model.norm.weight; give a complete causal model"):
        tiedlora.attach(hf_model(bases["llama"]).model, native)
    export_peft(find_model(str(bases["llama"])), native, tmp_path / "peft")
    with pytest.raises(tiedlora.UserError, match="this is a PEFT adapter; load it with PEFT, or import it"):
        tiedlora.load_adapter(tmp_path / "peft")
    with pytest.raises(tiedlora.UserError, match="no such folder"):
        tiedlora.load_adapter(tmp_path / "nothing")


def test_a_merged_model_is_not_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    """Also if another program has merged."""

    native = write_adapter(tmp_path / "native", bases["llama"], targets="all")
    merged = PeftModel.from_pretrained(hf_model(bases["llama"]), tmp_path / "native").merge_and_unload()
    with pytest.raises(tiedlora.UserError, match="whose weights differ"):
        tiedlora.attach(merged, native)


def test_the_names_are_there_and_load_nothing_before_use() -> None:
    assert set(tiedlora.__all__) <= set(dir(tiedlora))
    assert all(getattr(tiedlora, name) is not None for name in tiedlora.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Setting'"):
        _ = tiedlora.Setting  # type: ignore[attr-defined]
    code = (
        "import sys, megatron_tiedlora as t; t.Settings, t.UserError, dir(t);"
        " print([name for name in ('torch', 'transformers', 'deepspeed', 'peft') if name in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"


# Models whose weights accelerate keeps on the disk ------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(bases: dict[str, Path]) -> NativeAdapter:
    return write_adapter(bases["llama"].parent / "native", bases["llama"], targets="all")


def load(base: Path, folder: Path, *, rest: str) -> Any:
    """The model with layers 2 and 3 on the disk, in `folder`; layer 1, the final norm and the head are on `rest`."""
    devices = {"model.embed_tokens": "cpu", "model.rotary_emb": rest, "model.norm": rest, "lm_head": rest}
    devices.update({f"model.layers.{index}": "disk" if index else rest for index in range(3)})
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, device_map=devices, offload_folder=folder / "offload"
    ).eval()
    assert sum(weight.is_meta for weight in model.parameters()) > 10
    return model


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path) -> Any:
    return load(bases["llama"], tmp_path, rest=request.param)


def test_attached_to_an_offloaded_model_it_gives_the_same_bits(
    bases: dict[str, Path], native: NativeAdapter, offloaded: Any
) -> None:
    whole = hf_model(bases["llama"])
    plain, expected = logits_of(whole), logits_of(tiedlora.attach(whole, native))
    assert not torch.equal(plain, expected)
    assert torch.equal(logits_of(tiedlora.attach(offloaded, native)), expected)
    answers = [tiedlora.generate(model, "The sky is", max_new_tokens=5) for model in (offloaded, whole)]
    assert answers[0] == answers[1]
    with pytest.raises(tiedlora.UserError, match=r"q_proj.weight is quantised, offloaded or sharded; run"):
        tiedlora.merge(offloaded)
    assert torch.equal(logits_of(offloaded), expected)  # it is attached still
    assert torch.equal(logits_of(tiedlora.detach(offloaded)), plain)


def test_its_final_norm_is_compared_although_it_is_on_the_disk(
    bases: dict[str, Path], native: NativeAdapter, tmp_path: Path
) -> None:
    offloaded = load(bases["llama"], tmp_path, rest="disk")
    norm = offloaded.model.norm
    assert norm.weight.is_meta
    norm._hf_hook.weights_map = {"weight": torch.zeros_like(norm.weight, device="cpu")}
    with pytest.raises(tiedlora.UserError, match="whose weights differ from"):
        tiedlora.attach(offloaded, native)


def test_peft_rejects_it_in_one_line(bases: dict[str, Path], native: NativeAdapter, offloaded: Any) -> None:
    """PEFT's from_pretrained distributes the model again; without that, a new adapter is trained in place."""
    new = get_peft_model(offloaded, TiedLoraConfig(method="tl6", r=4))
    assert torch.equal(logits_of(new), logits_of(hf_model(bases["llama"])))  # tl6 begins with no update
    new.unload()
    with pytest.raises(tiedlora.UserError, match=r"PEFT cannot load .* partly offloaded \(device_map\); load"):
        PeftModel.from_pretrained(offloaded, bases["llama"].parent / "native")


# Training: a run in this process is the command's, and the process is as before when it ends --------------------------

CODE = """
import os, signal, sys
from megatron_tiedlora import Settings, UserError, attach, generate, load_adapter, load_base, train
from megatron_tiedlora.commands.front import call

call("random-model", ["--model=tiny", "--output=tiny"])
values = dict(model="tiny", train_file="rows.jsonl", max_steps=12, global_batch_size=8, learning_rate=0.1)
values.update(eval_interval=6, output_dir="one")
before = dict(os.environ), signal.getsignal(signal.SIGINT)
found = []
for folder in ("one", "two"):
    run = train(Settings(**{**values, "output_dir": folder}))
    assert run.adapter == run.folder / "adapter" and (run.step, run.reason) == (12, "max_steps"), run
    found.append(load_adapter(run.adapter))
assert found[0].equals(found[1])
for wrong in ({}, {"output_dir": "three", "layers": "99"}):
    try:
        train(Settings(**{**values, **wrong}))
    except UserError as error:
        print("rejected:", error)
after = {name: value for name, value in os.environ.items() if name in before[0] or "RANK" in name or "MASTER" in name}
assert (after, signal.getsignal(signal.SIGINT)) == before
print("answer:", len(generate(attach(load_base(found[0]), found[0]), "1 + 1 =", max_new_tokens=4)))
"""


@pytest.mark.distributed
def test_two_runs_in_one_process_need_neither_a_model_nor_a_network(tmp_path: Path) -> None:
    rows = ({"prompt": f"{number} + {number} =", "completion": f" {2 * number}"} for number in range(8))
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ended = python("-c", CODE, folder=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert ended.returncode == 0, ended.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+: validation loss (\S+)$", ended.stdout, re.MULTILINE)]
    assert len(losses) == 6 and losses[0] > 5.5 and losses[2] < losses[0] - 1
    rejected = [line for line in ended.stdout.splitlines() if line.startswith("rejected: ")]
    assert "one" in rejected[0] and "layers 1 to " in rejected[1] and len(rejected) == 2
    assert "answer: " in ended.stdout and (tmp_path / "one" / "run.yaml").is_file()
    assert ended.stderr.startswith("training: 100%| 12/12 [") and "\r" not in ended.stderr


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"dry_run": True}, "not support dry runs; use the command: tiedlora train --dry_run"),
        ({"adapters": "four.yaml"}, "use the command: tiedlora train --adapters FILE"),
    ],
)
def test_what_only_the_command_does(setting: dict[str, Any], line: str) -> None:
    with pytest.raises(tiedlora.UserError, match=line):
        tiedlora.train(tiedlora.Settings(**setting))


def test_settings_are_checked_and_have_a_schema() -> None:
    schema = tiedlora.Settings.model_json_schema()
    fields = schema["properties"]
    assert fields.keys() == tiedlora.Settings.model_fields.keys() and "required" not in schema
    assert fields["method"]["enum"] == ["lora", "vera", "tl1", "tl2", "tl3", "tl4", "tl5", "tl6"]
    words = {"description": "rank r of A and B", "title": "Rank"}
    assert fields["rank"] == {**words, "default": 8, "minimum": 1, "type": "integer"}
    for name, field in fields.items():
        assert field["description"] and not field.keys() & {"group", "flag", "choices"}, name
    for values, message in (
        ({"rank": 0}, "--rank 0: input should be greater than or equal to 1"),
        ({"rnk": 2}, r"unknown setting .rnk. .did you mean rank.."),
        ({"method": "tl7"}, "--method tl7: input should be one of"),
    ):
        with pytest.raises(tiedlora.UserError, match=message):
            tiedlora.Settings(**values)
