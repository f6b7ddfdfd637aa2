"""Runs on a quantised base: what they say and record, and what may use their adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.evaluation_runs import evaluate, results
from support.quantised_models import CROSSING, SHAPE, quantised_folder
from support.run_files import losses, run_settings
from support.run_helpers import Base, Ended, begin, run, write_base
from support.task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.evaluation.plan import plan_evaluations

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("own_cache")]

UP, QUERY = (f"model.layers.0.{name}.weight" for name in ("mlp.up_proj", "self_attn.q_proj"))
TRAINED_ON = "trained on its base in nf4, but this uses it in"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"), num_layers=2, **CROSSING)


@pytest.fixture(scope="module")
def begun(base: Base) -> Ended:
    """Two steps on nf4 over two tensor-parallel ranks."""
    return run(base, base.folder / "run", ranks=2, tensor_parallel=2, max_steps=2, base="nf4")


@pytest.fixture(scope="module")
def trained(base: Base, begun: Ended) -> Path:
    """Its folder."""
    text = begun.outputs[0]
    assert "parameters in fp32, frozen; the linears of its blocks in nf4" in text
    (line,) = [line for line in text.splitlines() if line.startswith("read  ")]
    assert "of base weights per rank, stored as " in line
    return base.folder / "run"


def test_the_record(trained: Path) -> None:
    assert run_settings(trained)["base"] == "nf4"
    native = load_native_adapter(trained / "adapter")
    assert native.base_identity.base_format == "nf4" and native.base_identity.dtype == "fp32"
    (step,) = (trained / "checkpoints").glob("step_2")
    for copy in (step, trained / "peft/native"):
        assert load_native_adapter(copy).base_identity == native.base_identity
    assert native.base_identity.base_stored == "fp32"
    assert json.loads((trained / "peft/tiedlora_export.json").read_text())["base_stored"] == "fp32"


def test_the_end_says_the_loss_on_the_stored_base(base: Base, begun: Ended, trained: Path, folder: Path) -> None:
    """It is the loss with which a run on that base starts from the adapter."""
    *_, line = begun.outputs[0].splitlines()
    assert line.startswith("on the base as it is stored, in fp32: validation loss ")
    assert "--onto trained" in begun.outputs[0]
    run(base, folder, max_steps=1, warmup_steps=0, init_from=trained / "adapter", rank=None)
    start = dict(losses(folder, "validation"))[0]
    assert float(line.split()[-1]) == pytest.approx(start, abs=1e-4)
    _, last = losses(trained, "validation")[-1]
    assert abs(last - start) > 1e-3, "nf4 and the stored weights differ"


@pytest.fixture(scope="module")
def plain(base: Base) -> tuple[Path, Ended]:
    """Two steps on the base as it is stored, and what they printed."""
    folder = base.folder / "plain"
    return folder, run(base, folder, max_steps=2)


def test_a_plain_run_records_nothing(plain: tuple[Path, Ended]) -> None:
    folder, ended = plain
    for file in ("adapter/adapter_config.json", "peft/tiedlora_export.json"):
        assert not {"base_format", "base_stored"} & json.loads((folder / file).read_text()).keys()
    assert "as it is stored" not in ended.outputs[0] and "--onto" not in ended.outputs[0]
    assert "stored as" not in ended.outputs[0] and "linears of its blocks" not in ended.outputs[0]


def refused(base: Base, folder: Path, /, **changes: Any) -> str:
    """The line with which another start of a run is refused."""
    return refusal(lambda: begin(base.arguments(output_dir=folder, max_steps=2, resume="auto", **changes)))


def test_it_resumes_on_the_same_format_alone(base: Base, trained: Path, plain: tuple[Path, Ended]) -> None:
    for given, text in (("int8", "now it is int8"), (None, "now it is not set")):
        line = refused(base, trained, base=given)
        assert f"trained with --base nf4, but {text}; resume with the same value" in line
    ended = run(base, trained, max_steps=2, resume="auto", base="nf4")  # at another layout
    assert "resumed from step 2" in ended.outputs[0]
    assert "trained with --base not set, but now it is nf4" in refused(base, plain[0], base="nf4")


def test_a_start_on_another_format_is_said(base: Base, trained: Path, tmp_path: Path) -> None:
    start = {"init_from": trained / "adapter", "rank": None, "max_steps": 2}
    for name, said in (("int8", True), ("nf4", False)):
        ended = run(base, tmp_path / name, base=name, **start)
        assert (f"{TRAINED_ON} {name}" in ended.outputs[0]) == said


def test_it_is_evaluated_as_trained_or_as_given(base: Base, trained: Path, tmp_path: Path) -> None:
    rows = str(base.folder / "validation.jsonl")
    shared = {"adapter": str(trained / "adapter"), "test_file": rows, "limit": 2, "max_new_tokens": 4}
    for used, more, said in (("nf4", {}, None), ("none", {"base": "none"}, "fp32"), ("int8", {"base": "int8"}, "int8")):
        ended = evaluate(tmp_path / used, work=tmp_path, **shared, **more)
        quantised = f"(the linears of its blocks in {used})"
        assert (quantised in ended.outputs[0]) == (used != "none")
        assert (TRAINED_ON in ended.outputs[0]) == (said is not None)
        assert said is None or f"{TRAINED_ON} {said};" in ended.outputs[0]
        found = results(tmp_path / used)
        assert found["settings"]["base"] == used and found["adapter"]["base_format"] == "nf4"
    with pytest.raises(UserError, match=r"--merge_adapter adds the adapter to weights .* in nf4; give --base none"):
        notes_of_evaluation(**shared, merge_adapter=True)


@pytest.fixture(scope="module")
def narrow(base: Base) -> Path:
    """The base in bf16: the same model, but another one in nf4."""
    copy = shutil.copytree(base.model, base.folder / "bf16")
    weights = load_file(copy / "model.safetensors")
    narrowed = {name: value.bfloat16() for name, value in weights.items()}
    save_file(narrowed, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


OTHER_VALUES = "has its linears in bf16, which is quantised to different values"


def test_a_copy_in_another_precision(
    base: Base, trained: Path, plain: tuple[Path, Ended], narrow: Path, tmp_path: Path
) -> None:
    """It has other values in nf4 than training saw: no run continues on it unless that is asked for."""
    shutil.copytree(trained, tmp_path / "run")
    line = refused(base, tmp_path / "run", base="nf4", model=narrow)
    assert f"quantised to nf4 from fp32, but {narrow} {OTHER_VALUES}; give the model in fp32" in line
    resumed = {"max_steps": 2, "resume": "auto", "base": "nf4", "model": narrow}
    ended = run(base, tmp_path / "run", **resumed, base_differs=True)
    assert "resumed from step 2" in ended.outputs[0] and OTHER_VALUES in ended.outputs[0]
    start = {"init_from": trained / "adapter", "rank": None, "max_steps": 2, "base": "nf4"}
    for model, said in ((narrow, True), (base.model, False)):
        ended = run(base, tmp_path / f"from {said}", model=model, **start)
        assert (OTHER_VALUES in ended.outputs[0]) == said
    assert load_native_adapter(tmp_path / "from True/adapter").base_identity.base_stored == "bf16"
    shutil.copytree(plain[0], tmp_path / "plain")
    ended = run(base, tmp_path / "plain", max_steps=2, model=narrow, resume="auto")
    assert "resumed from step 2" in ended.outputs[0], "weights that are not quantised are the same base"
    words = ["--adapter", str(trained / "adapter"), "--model", str(narrow)]
    with pytest.raises(UserError, match=f"--onto trained: .*{OTHER_VALUES}; give the model in fp32 with --model"):
        call("merge", [*words, "--output", str(tmp_path / "onto"), "--onto", "trained"])


def notes_of_evaluation(**settings: Any) -> tuple[str, ...]:
    """What is said of an evaluation before it starts."""
    return plan_evaluations(validate_settings(settings, EvaluateSettings), rank=0, world_size=1)[""].notes


def test_an_evaluation_says_what_differs_from_training(base: Base, trained: Path, narrow: Path, tmp_path: Path) -> None:
    """A copy in another precision; and nothing of how an adapter without a record was trained."""
    shared = {"test_file": str(base.folder / "validation.jsonl"), "adapter": str(trained / "adapter")}
    for model, more, expected in (
        (narrow, {}, OTHER_VALUES),
        (narrow, {"base": "none"}, TRAINED_ON),
        (base.model, {}, None),
    ):
        notes = notes_of_evaluation(**shared, model=str(model), **more)
        assert len(notes) == (expected is not None) and all(str(expected) in note for note in notes)
    exported, foreign = trained / "peft", tmp_path / "foreign"
    shutil.copytree(exported, foreign, ignore=shutil.ignore_patterns("native", "tiedlora_export.json"))
    for folder, said in ((exported, True), (foreign, False)):
        for given in ("int8", "none"):
            notes = notes_of_evaluation(**{**shared, "adapter": str(folder)}, model=str(base.model), base=given)
            assert any("trained on its base in" in note for note in notes) == said


def test_a_folder_that_is_quantised_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains in its own format, resumes, and merges into the original alone."""
    original = write_base(tmp_path / "base", num_layers=2, **SHAPE)
    quantised, values = quantised_folder(original.model, tmp_path / "nf4", "nf4 nested")
    started = run(original, tmp_path / "run", ranks=2, tensor_parallel=2, max_steps=2, model=quantised)
    assert "parameters in fp32, frozen; the linears of its blocks in nf4" in started.outputs[0]
    assert run_settings(tmp_path / "run")["base"] == "nf4"
    native = load_native_adapter(tmp_path / "run/adapter")
    assert native.base_identity.base_format == "nf4" and native.base_identity.base_stored is None
    plain = run(original, tmp_path / "plain", ranks=2, tensor_parallel=2, max_steps=2, model=values)
    for name, value in load_native_adapter(tmp_path / "plain/adapter").state.items():
        assert torch.equal(value, native.state[name]), "the run on the folder's values has the same adapter"
    assert plain.outputs[0] != started.outputs[0]
    ended = run(original, tmp_path / "run", max_steps=2, model=quantised, resume="auto")
    assert "resumed from step 2" in ended.outputs[0]
    line = refused(original, tmp_path / "int8", model=quantised, base="int8")
    assert "are already in nf4 (by bitsandbytes)" in line
    words = ["--adapter", str(tmp_path / "run/adapter"), "--output", str(tmp_path / "merged")]
    with pytest.raises(UserError, match=r"into so few bits, because .* or give --onto trained to write"):
        call("merge", words)
    with pytest.raises(UserError, match="give its own base with --model, or give --base_differs"):
        call("merge", [*words, "--model", str(original.model)])
    onto = [*words[:3], str(tmp_path / "onto"), "--onto", "trained"]
    assert call("merge", onto) == 0
    assert call("verify", [*words[:2], "--merged", onto[3], "--peft", str(tmp_path / "run/peft")]) == 0
    assert "merged onto nf4" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "onto/config.json").read_text())
    merged, was = load_file(tmp_path / "onto/model.safetensors"), load_file(values / "model.safetensors")
    assert merged.keys() == was.keys() and torch.equal(merged[UP], was[UP].to(merged[UP].dtype))
    assert not torch.equal(merged[QUERY], was[QUERY].to(merged[QUERY].dtype))
    merged[UP][3, 5] += 1
    save_file(merged, tmp_path / "onto/model.safetensors")
    assert call("verify", [*words[:2], "--merged", onto[3], "--in", "none"]) == 1
    with pytest.raises(UserError, match=r"--onto trained: .* has different weights from the base that training used"):
        call("merge", [*words, "--model", str(original.model), "--base_differs", "--onto", "trained"])
    capsys.readouterr()
    assert call("merge", [*words, "--model", str(original.model), "--base_differs"]) == 0
    assert "trained on its base in nf4, but this uses it in fp32" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged/tiedlora_merge.json").read_text())["base_differs"] == ["weights"]
    checked = [*words[:2], "--merged", words[3], "--model", str(original.model), "--base_differs", "--in", "none"]
    assert call("verify", checked) == 0


def test_products_in_fp8(base: Base, tmp_path: Path) -> None:
    """Over two tensor-parallel ranks; a run without them is another run."""
    found = {}
    for products in (None, "fp8"):
        folder = tmp_path / str(products)
        ended = run(base, folder, ranks=2, tensor_parallel=2, max_steps=2, base="fp8", products=products)
        assert ("the linears of its blocks in fp8, matmuls in fp8" in ended.outputs[0]) == (products == "fp8")
        assert run_settings(folder)["products"] == products
        assert load_native_adapter(folder / "adapter").base_identity.base_format == "fp8"
        found[products] = [loss for split in ("train", "validation") for _, loss in losses(folder, split)]
    assert len(found["fp8"]) == len(found[None]) and found["fp8"] != found[None]
    assert found["fp8"] == pytest.approx(found[None], rel=0.02)
    assert "trained with --products fp8, but now it is not set" in refused(base, tmp_path / "fp8", base="fp8")
    ended = run(base, tmp_path / "fp8", max_steps=2, resume="auto", base="fp8", products="fp8", keep_transposed=True)
    assert "resumed from step 2" in ended.outputs[0]
