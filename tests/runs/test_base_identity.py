"""An adapter belongs to a base and a tokenizer: what counts as another one, and that every command refuses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.evaluation_runs import evaluate as run_evaluation
from support.evaluation_runs import results
from support.native_files import with_adapter, write_native
from support.run_files import edit_json, edit_tensors, files_of, losses
from support.run_helpers import Base, begin, run, write_rows
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_identity import identify_base, sample_hash
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import RUN_LENGTH, SAMPLED_RUNS
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.data.tokenizer import load_tokenizer, tokenizer_hash
from megatron_tiedlora.model.weights import weight_rules

NORM = "model.norm.weight"
HELD_BIT, DROPPED_BIT = 1 << 16, 1  # of an fp32 number: the last one that bf16 holds, and the last one


@pytest.fixture(scope="module")
def made(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adapter/ and peft/ of that base."""
    folder = tmp_path_factory.mktemp("made")
    source, native, oracle = with_adapter(base.model, "tl6")
    write_native(folder / "adapter", base.model, oracle)
    export_peft(source, native, folder / "peft")
    return folder


# What counts as another base ----------------------------------------------------------------------------------------


Change = Callable[[dict[str, torch.Tensor]], Any] | None


def flip(tensor: torch.Tensor, bit: int, place: int = 0) -> None:
    """Flip a bit of one fp32 number, in place."""
    tensor.view(-1).view(torch.int32)[place] ^= bit


def swap_letters(folder: Path, one: str = "a", other: str = "b") -> None:
    """Two letters of the tokenizer change their ids."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids[one], ids[other] = ids[other], ids[one]
    file.write_text(json.dumps(content))


def changed(base: Path, target: Path, change: Change) -> Path:
    """A copy with its tensors changed, or with another tokenizer in the place of that change."""
    shutil.copytree(base, target, dirs_exist_ok=True)
    if change is None:
        swap_letters(target)
    else:
        edit_tensors(target / "model.safetensors", change)
    return target


UP, VALUE = "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.v_proj.weight"
DIFFER = "whose weights differ"
CHANGES: dict[str, tuple[Change, str]] = {  # and what is said of it
    "all but the norm": (lambda t: [t[name].normal_() for name in t if name != NORM], DIFFER),
    "one tensor": (lambda t: t[UP].normal_(), DIFFER),
    "one bit": (lambda t: flip(t[VALUE], HELD_BIT), DIFFER),
    "another tokenizer": (None, "a different tokenizer"),
}


def identity(folder: Path) -> Any:
    source = find_model(str(folder))
    with BaseWeights(folder, source.shape) as weights:
        return identify_base(source, weights, "fp32")


def test_every_tensor_counts(base: Base, tmp_path: Path) -> None:
    """Each by its first and its last number, and by the places between."""
    config = find_model(str(base.model)).shape
    original = identity(base.model).base_sample
    seen = set()
    for name in load_file(base.model / "model.safetensors"):
        for place in (0, -1):
            other = changed(base.model, tmp_path / "x", lambda t: flip(t[name], HELD_BIT, place))  # noqa: B023
            seen.add(identity(other).base_sample)
    names = [name for rule in weight_rules(config) for name in rule.hf_names]
    assert original not in seen and len(seen) == 2 * len(names)


def test_what_is_sampled_of_a_large_tensor(base: Base, tmp_path: Path) -> None:
    """Some thousands of numbers at fixed places, in stored parts as in one; the numbers between are not seen."""
    folder = write_tiny_model(
        tmp_path / "model", hidden_size=128, intermediate_size=352, vocab_size=1024, tokenizer=False
    )
    shape = find_model(str(folder)).shape
    name = "model.embed_tokens.weight"
    count = 1024 * 128
    edit_tensors(folder / "model.safetensors", lambda t: t.update({name: torch.arange(count).view(1024, 128).float()}))
    with BaseWeights(folder, shape) as weights:
        found, before = weights.sample(name), sample_hash(weights)
        assert weights.bytes_read == 0
    places = [int(place) for place in found.tolist()]
    assert len(set(places)) == len(places) == SAMPLED_RUNS * RUN_LENGTH
    assert places == sorted(places) and (places[0], places[-1]) == (0, count - 1)
    hidden = next(place for place in range(count) if place not in set(places))
    for place, same in ((hidden, True), (places[700], False)):
        other = changed(folder, tmp_path / "other", lambda t: flip(t[name], HELD_BIT, place))  # noqa: B023
        with BaseWeights(other, shape) as weights:
            assert (sample_hash(weights) == before) == same
        shutil.copy(folder / "model.safetensors", other / "model.safetensors")


def test_copies_are_the_same_base(base: Base, tmp_path: Path) -> None:
    """In bf16, in shards, with files rewritten by transformers, and with bits that bf16 does not hold."""
    original = identity(base.model)
    for name, keywords in (("bf16", {"dtype": torch.bfloat16}), ("shards", {"max_shard_size": "20KB"})):
        assert identity(write_tiny_model(tmp_path / name, **keywords)) == _renamed(original, tmp_path / name)
    other = changed(base.model, tmp_path / "bit", lambda t: flip(t[VALUE], DROPPED_BIT))
    assert identity(other) == _renamed(original, other)
    # A model of bf16 values, of which fp16 rounds the smallest.
    values = {name: tensor.bfloat16() * 1e-3 for name, tensor in load_file(base.model / "model.safetensors").items()}
    samples = set()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        save_file({name: tensor.to(dtype) for name, tensor in values.items()}, other / "model.safetensors")
        samples.add(identity(other).base_sample)
    assert len(samples) == 1
    assert any(not torch.equal(value.half().bfloat16(), value) for value in values.values())


def _renamed(base: Any, folder: Path) -> Any:
    return type(base)(**{**vars(base), "base_model": str(folder)})


def test_what_counts_of_a_tokenizer(base: Base, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base.model, tmp_path / "model"))
    before = tokenizer_hash(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for change, same in (
        ({"padding_side": "left", "tokenizer_class": "X", "model_max_length": 7}, True),
        ({"eos_token": {"content": "</s>", "lstrip": False}}, True),  # as version 4 writes it
        ({"eos_token": "<s>"}, False),
        ({"bos_token": "x"}, False),
        ({"chat_template": "{{ messages }}"}, False),
        # Tokens that the config adds beside the vocabulary, but not those that this lists already.
        ({"added_tokens_decoder": {"259": {"content": "Answer"}}}, False),
        ({"extra_special_tokens": ["Answer"]}, False),
        ({"additional_special_tokens": [{"content": "Answer"}]}, False),
        ({"added_tokens_decoder": {"2": {"content": "</s>"}}, "extra_special_tokens": ["<s>"]}, True),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **change}))
        assert (tokenizer_hash(folder) == before) == same, change
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    as_file = tokenizer_hash(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    assert tokenizer_hash(folder) == as_file != before
    assert tokenizer_hash(write_tiny_model(tmp_path / "none", tokenizer=False)) is None


# Commands x changes -------------------------------------------------------------------------------------------------


def tool(name: str, made: Path, model: Path, output: Path, *words: str) -> None:
    """A command, in this process."""
    given = f"--peft={made / 'peft'}" if name == "verify" else f"--output={output}"
    call(name, [f"--adapter={made / 'adapter'}", f"--model={model}", given, *words])


merge, export, verify = (partial(tool, name) for name in ("merge", "export", "verify"))


def evaluate(made: Path, model: Path, output: Path, *words: str, kind: str = "adapter") -> None:
    from megatron_tiedlora.config.adapter_settings import EvaluateSettings
    from megatron_tiedlora.config.cli import parse_settings
    from megatron_tiedlora.evaluation.plan import plan_evaluations

    argv = ["--adapter", str(made / kind), "--model", str(model), "--task", "gsm8k", *words]
    plan = plan_evaluations(parse_settings(argv, EvaluateSettings), rank=0, world_size=1)[""]
    assert not words or any("--base_differs" in note for note in plan.notes), plan.notes


COMMANDS = {
    "merge": merge,
    "export": export,
    "verify": verify,
    "evaluate": evaluate,
    "evaluate PEFT": partial(evaluate, kind="peft"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_another_base_is_refused_by_every_command(
    base: Base, made: Path, tmp_path: Path, command: str, kind: str
) -> None:
    change, said = CHANGES[kind]
    model = changed(base.model, tmp_path / "model", change)
    with pytest.raises(UserError) as error:
        COMMANDS[command](made, model, tmp_path / "output")
    line = str(error.value)
    assert said in line and str(model) in line and "--base_differs" in line and line.isprintable()
    assert not (tmp_path / "output").exists()
    COMMANDS[command](made, model, tmp_path / "output", "--base_differs")
    what = ["tokenizer"] if change is None else ["weights"]
    for record in tmp_path.glob("output/tiedlora_*.json"):
        assert json.loads(record.read_text())["base_differs"] == what
    assert (tmp_path / "output").exists() == (command in ("merge", "export"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_base_is_taken_by_every_command(base: Base, made: Path, tmp_path: Path, command: str) -> None:
    model = changed(base.model, tmp_path / "model", lambda t: flip(t[VALUE], DROPPED_BIT))
    COMMANDS[command](made, model, tmp_path / "output")
    for record in tmp_path.glob("output/tiedlora_*.json"):
        assert "base_differs" not in json.loads(record.read_text())


def test_the_result_of_an_evaluation_says_so(base: Base, made: Path, tmp_path: Path) -> None:
    model = changed(base.model, tmp_path / "model", CHANGES["one tensor"][0])
    rows = write_rows(tmp_path / "rows.jsonl", 2)
    chosen = {"adapter": made / "adapter", "model": model, "test_file": rows, "max_new_tokens": 2}
    start = partial(run_evaluation, tmp_path / "out", work=tmp_path / "work", **chosen)
    assert DIFFER in start(expect=2).error_line()
    assert DIFFER in start(base_differs=True).outputs[0]
    assert results(tmp_path / "out")["adapter"]["base_differs"] is True


@pytest.mark.distributed
@pytest.mark.parametrize("kind", CHANGES)
def test_another_base_is_refused_at_a_resume(
    base: Base, stopped: Path, tmp_path: Path, folder: Path, own_cache: None, kind: str
) -> None:
    change, said = CHANGES[kind]
    model = changed(base.model, tmp_path / "model", change)
    if change is None:  # letters that the data does not have: its tokens are the same
        shutil.copy(base.model / "tokenizer.json", model)
        swap_letters(model, "Q", "R")
    before = files_of(stopped)
    line = refusal(lambda: begin(base.arguments(output_dir=stopped, resume="auto", model=model)))
    assert said in line and files_of(stopped) == before
    if kind in ("one bit", "another tokenizer"):
        shutil.copytree(stopped, folder)
        ended = run(base, folder, resume="auto", model=model, base_differs=True)
        assert "note       " in ended.outputs[0] and "(--base_differs)" in ended.outputs[0]
        assert "base_differs: true" in (folder / "run.yaml").read_text()


@pytest.mark.distributed
def test_hosts_with_different_copies_are_refused(base: Base, tmp_path: Path, folder: Path) -> None:
    other = changed(base.model, tmp_path / "model", CHANGES["one tensor"][0])
    ended = run(base, folder, ranks=2, prelude=partial(_own_copy, str(other)), expect=2)
    assert "1 rank read a base model or tokenizer that differs from rank 0's" in ended.error_line()
    assert not folder.exists()


def _own_copy(folder: str) -> None:
    import os

    from megatron_tiedlora.checkpoint.sources import ModelSource

    if os.environ["RANK"] == "1":
        ModelSource.weights_folder = lambda source: Path(folder)  # type: ignore[method-assign]


@pytest.mark.distributed
@pytest.mark.parametrize(("engine", "base_format"), [("zero0.json", None), ("zero1.json", "nf4"), ("zero2.json", None)])
def test_replicas_get_the_base_from_the_first_rank(
    base: Base, tmp_path: Path, folder: Path, engine: str, base_format: str | None
) -> None:
    """Rank 1 reads no weight, and has the bits of rank 0 after each step. They compute what one rank does alone."""
    given: dict[str, Any] = {"ds_config": engine, "base": base_format}
    run(base, folder, ranks=2, prelude=_reads_no_weights, **given)
    run(base, tmp_path / "alone", **given)
    ours, alone = losses(folder), losses(tmp_path / "alone")
    assert [step for step, _ in ours] == [step for step, _ in alone] and len(ours) > 1
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in alone], rel=1e-5)


def _reads_no_weights() -> None:
    import hashlib
    import os

    import torch
    from torch import distributed

    from megatron_tiedlora.training.step import TrainStep

    if os.environ["RANK"] == "1":
        BaseWeights.fill = lambda *_, **__: pytest.fail("a replica reads a weight")  # type: ignore[method-assign]
    real = TrainStep.run

    def checked(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found, hashes, of_all = real(self, *arguments, **keywords), [], [None, None]
        for name, parameter in self.runner.stage.named_parameters():
            if name.startswith("layers."):
                hashes.append(hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).digest())
        distributed.all_gather_object(of_all, hashes)
        assert hashes and of_all[0] == of_all[1], "the base of the ranks differs"
        return found

    TrainStep.run = checked  # type: ignore[method-assign]


# Tokenizers of a run's own, merged bases --------------------------------------------------------------


@pytest.mark.parametrize("files", [["../secret/tokenizer.1.0.0.json"], ["tokenizer.1.0.0.json"]])
def test_a_config_names_no_other_tokenizer_file(base: Base, tmp_path: Path, files: list[str]) -> None:
    """transformers would read it in place of the folder's own."""
    folder = Path(shutil.copytree(base.model, tmp_path / "model"))
    edit_json(folder / "tokenizer_config.json", fast_tokenizer_files=files)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: fast_tokenizer_files .* names another file"):
        load_tokenizer(folder)


def test_a_run_with_a_tokenizer_of_its_own(base: Base, made: Path, tmp_path: Path) -> None:
    """Its adapter goes with that tokenizer wherever text is read or a tokenizer is written."""
    own = Path(shutil.copytree(base.model, tmp_path / "own"))
    swap_letters(own)
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    edit_json(file, tokenizer=str(own), tokenizer_hash=tokenizer_hash(own))
    content = json.loads(file.read_text())
    for name in ("sha256", "config_sha256"):
        del content[name]
    file.write_text(json.dumps(content))
    for command in (merge, evaluate):
        said = f"trained with a different tokenizer .{own}.* give that tokenizer with --tokenizer"
        with pytest.raises(UserError, match=said):
            command(tmp_path, base.model, tmp_path / "output")
    merge(tmp_path, base.model, tmp_path / "output", "--tokenizer", str(own))
    assert tokenizer_hash(tmp_path / "output") != tokenizer_hash(base.model)
    export(tmp_path, base.model, tmp_path / "peft")
    with pytest.raises(UserError, match=f"trained with a different tokenizer .{own}"):
        evaluate(tmp_path, base.model, tmp_path / "output", kind="peft")
    verify(tmp_path, base.model, tmp_path / "none")


def test_a_head_that_is_tied_by_name_alone_is_refused(tmp_path: Path) -> None:
    """transformers ties nothing where the files hold another head; so the config has to say it."""
    folder = write_tiny_model(tmp_path / "model", tied=True)
    shape = find_model(str(folder)).shape
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder / "model.safetensors", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    with BaseWeights(folder, shape):
        pass  # a copy is no other head
    shorter = {"lm_head.weight": embedding[:7]}
    for change in (lambda t: flip(t["lm_head.weight"], DROPPED_BIT, -1), lambda t: t.update(shorter)):
        edit_tensors(folder / "model.safetensors", change)
        with pytest.raises(UserError, match=r"config\.json: tie_word_embeddings is true, but lm_head\.weight differs"):
            BaseWeights(folder, shape)
