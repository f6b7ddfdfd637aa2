"""lm_eval's model `tiedlora`: its scores and answers are those of the merged model in plain transformers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folders import ROOT
from support.peft_models import greedy_tokens, hf_model, write_adapter, write_bases
from support.task_files import write_rows
from transformers import AutoTokenizer

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.data.chat import chat_template_sha256

lm_eval = pytest.importorskip("lm_eval")

CHOOSE = [
    {"question": "ab cd"[: 2 + i % 3] + "?" * (i + 1), "choices": ["x", "yz", "w v"], "answer": i % 3} for i in range(6)
]
WRITE = [{"question": f"{'abc def ' * (i + 1)}{i}:"} for i in range(4)]
UNTIL, MOST = "e", 12
TASKS = {
    "tl_choose": {
        "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "tl_write": {
        "output_type": "generate_until", "doc_to_target": "none",
        "generation_kwargs": {"until": [UNTIL], "max_gen_toks": MOST, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tl_roll": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    write_adapter(folder, bases["llama"], targets="all", scale=1.0)
    return folder


@pytest.fixture(scope="module")
def merged(bases: dict[str, Path], adapter: Path) -> Any:
    from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter

    merge_adapter(find_model(str(bases["llama"])), load_native_adapter(adapter), adapter.parent / "merged")
    return hf_model(adapter.parent / "merged")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of `TASKS` and of their rows; JSON is YAML."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        file = write_rows(folder / f"{name}.jsonl", CHOOSE if name == "tl_choose" else WRITE)
        data = {"data_files": {"test": file}, "cache_dir": str(folder / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({**common, "doc_to_text": "{{question}}", **task}))
    return folder


@torch.no_grad()
def log_likelihood(model: Any, before: list[int], after: list[int]) -> tuple[float, bool]:
    """The summed log-probability of `after`, and whether greedy decoding would write it."""
    scores = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    chosen = torch.tensor(after)
    return scores.gather(1, chosen[:, None]).sum().item(), bool((scores.argmax(-1) == chosen).all())


def expected(model: Any, folder: Path) -> dict[str, list[Any]]:
    """The responses to all requests of each task, in order."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, list[Any]] = {name: [] for name in TASKS}
    for row in CHOOSE:
        before = tokenizer(row["question"]).input_ids
        wholes = [tokenizer(f"{row['question']} {choice}").input_ids for choice in row["choices"]]  # type: ignore[attr-defined]
        found["tl_choose"].append([log_likelihood(model, before, whole[len(before) :]) for whole in wholes])
    for row in WRITE:
        prompt = tokenizer(row["question"]).input_ids
        text = tokenizer.decode(greedy_tokens(model, prompt, MOST, eos=tokenizer.eos_token_id))
        found["tl_write"].append(text.split(UNTIL)[0])
        # lm_eval puts a BOS before the text's tokens, which begin with the tokenizer's own.
        found["tl_roll"].append(log_likelihood(model, [tokenizer.bos_token_id], prompt)[0])
    return found


def responses(tasks: Path, **options: Any) -> dict[str, list[Any]]:
    """What lm_eval's model answers to the requests of each task."""
    from lm_eval.tasks import TaskManager

    import megatron_tiedlora.lm_eval  # noqa: F401

    result = lm_eval.simple_evaluate(
        "tiedlora", options, tasks=[*TASKS], task_manager=TaskManager(include_path=str(tasks)), device="cpu",
        bootstrap_iters=0,
    )  # fmt: skip
    found = {}
    for name, samples in result["samples"].items():
        answers = [[answer for (answer,) in one["resps"]] for one in sorted(samples, key=lambda one: one["doc_id"])]
        found[name] = answers if name == "tl_choose" else [answer for (answer,) in answers]
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_and_answers_are_those_of_the_merged_model(
    adapter: Path, bases: dict[str, Path], merged: Any, tasks: Path, batch_size: int
) -> None:
    found, wanted = responses(tasks, adapter=str(adapter), batch_size=batch_size), expected(merged, bases["llama"])
    base = expected(hf_model(bases["llama"]), bases["llama"])
    assert found["tl_write"] == wanted["tl_write"] != base["tl_write"]
    assert any(len(text) < MOST for text in found["tl_write"])  # some end before `until`
    assert found["tl_roll"] == pytest.approx(wanted["tl_roll"], abs=1e-3)
    assert wanted["tl_roll"] != pytest.approx(base["tl_roll"], abs=1e-1)
    for ours, theirs in zip(found["tl_choose"], wanted["tl_choose"], strict=True):
        assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def load(adapter: Path, **options: Any) -> Any:
    from megatron_tiedlora.integrations.lm_eval_model import TiedLoraLM

    return TiedLoraLM(str(adapter), device="cpu", **options)


@pytest.mark.parametrize("starts", ["auto", "true", "false"])
def test_the_run_s_chat_template_and_start_of_texts(adapter: Path, starts: str, tmp_path: Path) -> None:
    (tmp_path / "adapter").symlink_to(adapter)
    (template := tmp_path / "chat.jinja").write_text(TEMPLATE)
    rules = {"chat_template": str(template), "chat_template_sha256": chat_template_sha256(template), "add_bos": starts}
    (tmp_path / "run.yaml").write_text(json.dumps({"task": "custom", **rules}))
    model = load(tmp_path / "adapter")
    assert model.apply_chat_template(CHAT) == "<user>hi<a>"
    assert (model.tok_encode("ab")[0] == model.tokenizer.bos_token_id) == (starts != "false")
    template.write_text(TEMPLATE + " ")
    with pytest.raises(UserError, match=r"chat\.jinja of the adapter's run has changed"):
        load(tmp_path / "adapter")


def test_the_precision_is_that_of_training_or_as_given(adapter: Path) -> None:
    assert load(adapter).model.dtype == torch.float32
    assert {load(adapter, dtype=name).model.dtype for name in ("bf16", "bfloat16")} == {torch.bfloat16}


def test_wrong_arguments_give_one_line(adapter: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
    from megatron_tiedlora.integrations.lm_eval_model import TiedLoraLM

    source = find_model(str(bases["llama"]))
    export_peft(source, load_native_adapter(adapter), tmp_path / "peft")
    with pytest.raises(UserError, match=r"base_difers: the model tiedlora has no such .*mean base_differs"):
        load(adapter, base_difers=True)
    with pytest.raises(UserError, match="--model_args peft: the model tiedlora has no such argument"):
        load(adapter, peft="x")
    with pytest.raises(UserError, match="this is a PEFT adapter; give it to lm_eval's own model: --model hf"):
        load(tmp_path / "peft")
    with pytest.raises(UserError, match="dtype=int4: is not one of bf16, fp16, fp32"):
        load(adapter, dtype="int4")
    with pytest.raises(UserError, match="has no adapter; give adapter=RUN/adapter"):
        TiedLoraLM()
    with pytest.raises(UserError, match=r"trained on .* use its own base"):
        load(adapter, model=str(bases["phi3"]))


def test_base_differs_accepts_another_base_of_the_shape(adapter: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    other = hf_model(bases["llama"])
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path)
    options = {"model": str(tmp_path), "tokenizer": str(bases["llama"])}
    with pytest.raises(UserError, match="whose weights differ"):
        load(adapter, **options)
    with pytest.warns(UserWarning, match="differ"):
        assert torch.equal(load(adapter, base_differs=True, **options).model.model.norm.weight, other.model.norm.weight)


def run(*words: str, tasks: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_tiedlora.lm_eval", "--model", "tiedlora", "--include_path", str(tasks)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.timeout(240)
@pytest.mark.cpu_seconds(30, reason="two processes import lm_eval")
def test_the_command(adapter: Path, tasks: Path) -> None:
    """A batch size of the model has precedence over the flag's default."""
    words = ("--tasks", "tl_write", "--device", "cpu", "--model_args")
    done = run(*words, f"adapter={adapter},batch_size=2", tasks=tasks)
    assert done.returncode == 0 and "|tl_write|" in done.stdout, done.stderr
    done = run(*words, f"adapter={adapter}x", tasks=tasks)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: --model_args adapter={adapter}x: no such folder; give")


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "megatron_tiedlora.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"needs lm_eval .* run `pip install 'lm_eval\[hf\]'`"):
        importlib.import_module("megatron_tiedlora.lm_eval")
