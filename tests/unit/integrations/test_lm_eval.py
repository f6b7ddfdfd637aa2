"""lm_eval's model `tiedlora`: its scores and answers are those of the merged model in plain transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import python
from support.peft_models import greedy_tokens, hf_model, write_adapter, write_bases
from support.run_files import edit_json
from support.task_files import refusal, write_rows
from transformers import AutoTokenizer

import megatron_tiedlora as tiedlora
from megatron_tiedlora.data.chat import chat_template_sha256

lm_eval, lm_eval_tasks = (pytest.importorskip(name) for name in ("lm_eval", "lm_eval.tasks"))

CHOICES = ["x", "yz", "w v"]
ROWS = [{"question": f"{'abc def ' * (i + 1)}{i}:", "choices": CHOICES, "answer": i % 3} for i in range(4)]
MOST = 12
TASKS: dict[str, dict[str, Any]] = {
    "choose": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
    "write": {"output_type": "generate_until", "doc_to_target": "none", "generation_kwargs": {"until": ["e"]}},
    "roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"},
}
TASKS["write"]["generation_kwargs"] |= {"max_gen_toks": MOST, "do_sample": False}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_adapter(folder := tmp_path_factory.mktemp("run") / "adapter", bases["llama"], targets="all", scale=1.0)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of `TASKS` (JSON is YAML) and their rows."""
    folder = tmp_path_factory.mktemp("tasks")
    data = {"data_files": {"test": write_rows(folder / "rows.jsonl", ROWS)}, "cache_dir": str(folder / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{question}}"}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"tl_{name}", **common, **task}))
    return folder


def samples_of(model: Any, tasks: Path, *names: str, **options: Any) -> dict[str, Any]:
    """What lm_eval finds for each of these tasks."""
    manager = lm_eval_tasks.TaskManager(include_path=str(tasks))
    found = lm_eval.simple_evaluate(model, tasks=[f"tl_{name}" for name in names], task_manager=manager, **options)
    return {name: found["samples"][f"tl_{name}"] for name in names}


def load(adapter: Any, **options: Any) -> Any:
    from megatron_tiedlora.integrations.lm_eval_model import TiedLoraLM

    return TiedLoraLM(str(adapter), device="cpu", **options)


@torch.no_grad()
def log_likelihood(model: Any, before: list[int], after: list[int]) -> float:
    scores = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, torch.tensor(after)[:, None]).sum())


def expected(model: Any, folder: Path) -> dict[str, list[Any]]:
    """The responses of a model of transformers to all requests of each task."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), dict[str, list[Any]](choose=[], write=[], roll=[])
    for ids in (tokenizer(row["question"]).input_ids for row in ROWS):
        texts = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in CHOICES]
        found["choose"].append([log_likelihood(model, ids, text) for text in texts])
        text = tokenizer.decode(greedy_tokens(model, ids, MOST, eos=tokenizer.eos_token_id))
        found["write"].append(text.split("e")[0])
        # lm_eval puts a BOS before the text's tokens, which begin with the tokenizer's own.
        found["roll"].append(log_likelihood(model, [tokenizer.bos_token_id], ids))
    return found


def test_scores_and_answers_are_those_of_the_merged_model(adapter: Path, bases: dict[str, Path], tasks: Path) -> None:
    import megatron_tiedlora.lm_eval  # noqa: F401

    options = {"adapter": str(adapter), "batch_size": 3, "device": "cpu"}
    samples, base = samples_of("tiedlora", tasks, *TASKS, model_args=options), hf_model(bases["llama"])
    found = {name: [[one for (one,) in row["resps"]] for row in rows] for name, rows in samples.items()}
    unlike = expected(base, bases["llama"])
    wanted = expected(tiedlora.merge(base, tiedlora.load_adapter(adapter)), bases["llama"])
    assert [text for (text,) in found["write"]] == wanted["write"] != unlike["write"]
    assert [score for (score,) in found["roll"]] == pytest.approx(wanted["roll"], abs=1e-3)
    assert unlike["roll"] != pytest.approx(wanted["roll"], abs=0.1)
    for ours, theirs in zip(found["choose"], wanted["choose"], strict=True):
        assert [score for score, _ in ours] == pytest.approx(theirs, abs=1e-3)


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Path:
    """A run's folder with the adapter and a chat template, which its settings name."""
    (tmp_path / "adapter").symlink_to(adapter)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    record_run(tmp_path)
    return tmp_path


def record_run(run: Path, **rules: str) -> None:
    template = run / "chat.jinja"
    rules |= {"chat_template": str(template), "chat_template_sha256": chat_template_sha256(template)}
    (run / "run.yaml").write_text(json.dumps({"task": "custom", **rules}))


@pytest.mark.parametrize("starts", ["auto", "false", "true"])
@pytest.mark.parametrize("adds", [True, False])
def test_the_run_s_chat_template_and_start_of_texts(
    adapter: Path, bases: dict[str, Path], run: Path, starts: str, adds: bool
) -> None:
    """With a tokenizer that adds a BOS, and with one that does not."""
    record_run(run, add_bos=starts)
    AutoTokenizer.from_pretrained(bases["llama"]).save_pretrained(run / "tokenizer")
    if not adds:
        edit_json(run / "tokenizer" / "tokenizer.json", seals=False, post_processor=None)
    model = load(run / "adapter", dtype="bfloat16", tokenizer=str(run / "tokenizer"))
    for text, begins in (("ab", starts == "true" or (adds and starts == "auto")), ("<user>hi<a>", starts == "true")):
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        ids = [model.tokenizer.bos_token_id] * begins + ids
        assert model.tok_encode(text) == model.tok_batch_encode([text])[0][0].tolist() == ids
        assert model.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi<a>"
    assert (model.model.dtype, load(adapter).model.dtype) == (torch.bfloat16, torch.float32)


def test_chats_are_encoded_without_a_bos(run: Path, tasks: Path) -> None:
    """In training none is added to a templated chat. lm_eval itself puts one before texts whose likelihood it rolls."""
    model, seen = load(run / "adapter"), list[torch.Tensor]()
    embeddings = model.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, ids, __: seen.append(ids[0]) if ids[0].shape[1] > 1 else None)
    for name, most in (("choose", 0), ("write", 0), ("roll", 1)):
        seen.clear()
        samples_of(model, tasks, name, apply_chat_template=True, batch_size=1)
        assert {int((ids == model.tokenizer.bos_token_id).sum()) for ids in seen} == {most}, name


def test_a_tokenizer_that_cannot_add_a_bos(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of some libraries ignore the attribute."""
    from megatron_tiedlora.integrations import lm_eval_model

    record_run(run, add_bos="true")
    monkeypatch.setattr(lm_eval_model, "start_ids", lambda _, add_bos: [1] * (add_bos == "true"))
    assert "cannot begin texts with its BOS (--add_bos true of the run); give" in refusal(load, run / "adapter")


def test_a_chat_template_that_has_changed(run: Path) -> None:
    """The old one is given as an argument of the model."""
    old = run / "old.jinja"
    (run / "chat.jinja").rename(old)
    assert refusal(load, run / "adapter").startswith("--model_args: --chat_template ")
    model = load(run / "adapter", chat_template=str(old))
    assert model.apply_chat_template([{"role": "user", "content": "hi"}]) == "<user>hi<a>"


def test_wrong_arguments_give_one_line(adapter: Path, bases: dict[str, Path]) -> None:
    said = "base_difers: the model tiedlora has no such argument (did you mean base_differs?)"
    assert said in refusal(load, adapter, base_difers=True)
    assert "--model_args dtype=int4: is not one of bf16, fp16, fp32" in refusal(load, adapter, dtype="int4")
    assert "has no adapter; give adapter=RUN/adapter" in refusal(load, "")
    assert "use its own base" in refusal(load, adapter, model=str(bases["phi3"]))


@pytest.mark.timeout(240)
@pytest.mark.cpu_seconds(30, reason="two processes import lm_eval")
def test_the_command(adapter: Path, tasks: Path) -> None:
    """A batch size of the model has precedence over the flag's default."""
    words = ["-m", "megatron_tiedlora.lm_eval", "--model", "tiedlora", "--include_path", tasks, "--tasks", "tl_write"]
    for given, status, said in ((adapter, 0, ""), (f"{adapter}x", 2, f"error: {adapter}x: no such folder; give")):
        model = f"adapter={given},batch_size=2"
        done = python(*words, "--device", "cpu", "--model_args", model, HF_HUB_OFFLINE="1")
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.splitlines()[-1].startswith(said) and ("|tl_write|" in done.stdout) == (status == 0)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_tiedlora.lm_eval import main

    monkeypatch.delitem(sys.modules, "megatron_tiedlora.integrations.lm_eval_model")
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    assert "this needs lm_eval and what it imports" in refusal(main)
