"""Texts, rows, patterns and templates out of strangers' files that are made to take time or memory without end.

Each ends within 2 s of a processor and 1 GB in one line, and what is ordinary is read as before.
"""

from __future__ import annotations

import json
import random
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import bounded, outcome
from support.task_files import refusal, write
from support.tiny_models import write_tiny_tokenizer

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.convert.peft_files import name_matcher, pattern_finder
from megatron_tiedlora.data import readers
from megatron_tiedlora.data.encode import decode_ids, encode_prompts
from megatron_tiedlora.data.readers import read_lines, read_rows, without_line_breaks
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.data.tasks.hellaswag import clean
from megatron_tiedlora.data.tokenizer import end_ids, load_tokenizer, tokenizer_errors
from megatron_tiedlora.evaluation.answering import _cut
from megatron_tiedlora.evaluation.metrics import METRICS, Answer
from megatron_tiedlora.runtime.launch_env import slurm_hosts

MEGABYTE = 10**6


def random_texts(parts: list[str], count: int, longest: int) -> list[str]:
    draw = random.Random(5)
    return ["".join(draw.choices(parts, k=draw.randint(0, longest))) for _ in range(count)]


# Patterns of PEFT's config -----------------------------------------------------------------------------------------


def test_a_pattern_matches_as_re_does(whole: bool) -> None:
    """Of all rows of pieces those that are accepted, on names that many of them match: whole, and as PEFT matches the
    keys of rank_pattern."""
    pieces = ["a", "b", "1", "_", r"\.", ".", ".*", ".+", r"\d+", "[0-9]+", ".*?", r"\b"]
    pieces += ["|", "(", "(?:", ")", "^", "$"]
    names = random_texts(["a", "b", "1", "_", "."], 5000, 6)
    count = 30_000 if whole else 6000
    accepted = matched = ended = 0
    for number, pattern in enumerate(random_texts(pieces, count, 8)):
        try:
            compiled = re.compile(pattern)
        except re.error:
            compiled = None
        try:
            matches = name_matcher(pattern, what="x")
        except UserError:
            assert compiled is None or not pattern, pattern
            continue
        assert compiled is not None, pattern
        accepted += 1
        find = pattern_finder([pattern], what="x")
        for name in names[4 * number % 5000 :][:4]:
            matched += matches(name)
            assert matches(name) == bool(compiled.fullmatch(name)), (pattern, name)
            keyed = re.match(rf"(.*\.)?({pattern})$", name)
            assert find(name) == (pattern if keyed else None), (pattern, name)
            ended += bool(keyed)
    assert accepted > count / 3 and matched > count / 12 and ended > 1.2 * matched


@pytest.mark.parametrize("pattern", ["(.|.)" * 200, ".*" * 500, "(?:.*|.*)" * 111, ("(" * 50 + ")" * 50) * 10])
def test_no_accepted_pattern_takes_long(pattern: str) -> None:
    with bounded():
        matches = name_matcher(pattern, what="x")
        for layer in range(500):
            matches(f"model.layers.{layer}.self_attn.q_proj!")
    with pytest.raises(UserError, match="50 deep, at most 1,000 characters"):
        name_matcher("(" * 51 + ")" * 51, what="x")


def test_a_pattern_for_each_module_takes_no_longer() -> None:
    """As many whole names as the largest models have, and the longest list of the slowest pieces."""
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(126) for part in "abcdefg"]
    with bounded(20.0):
        find = pattern_finder(names, what="x")
        assert [find(name) for name in names[::7]] == names[::7]
        find = pattern_finder([f"{number}{('(|' * 50 + ')' * 50) * 6}" for number in range(10, 65)], what="x")
        assert not any(map(find, names[::7]))


def test_a_million_names_take_no_longer_than_one() -> None:
    with bounded():
        matches = name_matcher([f"{number}.q_proj" for number in range(MEGABYTE)], what="x")
        assert all(matches(f"model.layers.{layer}.self_attn.{layer}.q_proj") for layer in range(500))
        assert not matches("q_proj") and not matches("x1.q_proj") and matches("1.q_proj")


# Rows --------------------------------------------------------------------------------------------------------------


def parquet(path: Path, *, rows: int, size: int) -> Path:
    """A small file of many equal rows, which its dictionary holds once."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array(["x" * size]))
    table = pyarrow.table({"prompt": text, "completion": text})
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=rows, store_schema=False)
    assert path.stat().st_size < 300_000
    return path


def test_of_a_parquet_file_no_more_rows_are_read_than_asked_for(tmp_path: Path) -> None:
    file = parquet(tmp_path / "rows.parquet", rows=MEGABYTE, size=1000)
    with bounded():
        rows = read_rows(file, limit=5)
    assert [source for _, source in rows] == [f"{file}: row {number}" for number in range(1, 6)]
    assert all(row == {"prompt": "x" * 1000, "completion": "x" * 1000} for row, _ in rows)
    small = parquet(tmp_path / "small.parquet", rows=200, size=3)
    assert [len(read_rows(small, limit=limit)) for limit in (1, 64, 65, 200, 300, None)] == [1, 64, 65, 200, 200, 200]


@pytest.mark.parametrize(
    ("rows", "size", "limit"),
    [(1000, MEGABYTE, None), pytest.param(20, 2 * 10**7, 20, marks=pytest.mark.slow), (9, 10**8, None)],
)
def test_a_small_parquet_file_is_not_made_gigabytes(tmp_path: Path, rows: int, size: int, limit: int | None) -> None:
    file = parquet(tmp_path / "rows.parquet", rows=rows, size=size)
    with bounded(seconds=5.0):  # 256 MB of new pages take a busy machine's kernel more than a second
        found = outcome(lambda: read_rows(file, limit=limit), unchanged=tmp_path, names=(str(file),))
    assert isinstance(found, UserError) and "need more than" in str(found)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_many_ordinary_rows_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    numbers = [str(number) for number in range(100_000)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": numbers, "completion": numbers}), file)
    rows = read_rows(file)
    assert len(rows) == 100_000 and rows[-1][0] == {"prompt": "99999", "completion": "99999"}


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    path.write_bytes(start)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "c.json", "a.parquet", "a.de"])
def test_sparse_files_of_gigabytes(tmp_path: Path, name: str) -> None:
    start = {"a.jsonl": b'{"a": 1}\n', "b.json": b'[{"a": 1}', "c.json": b"", "a.parquet": b"PAR1"}.get(name, b"a\n")
    file = sparse(tmp_path / name, 2**30 if name == "b.json" else 2**36, start)
    with bounded():
        message = refusal(read_lines if name == "a.de" else read_rows, file)
    assert message.startswith(str(file))


def test_a_line_of_absurd_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LONGEST_LINE", 30)
    rows = [{"a": "x" * count} for count in (20, 21)]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [row for row, _ in read_rows(file)] == rows[:1] + rows[1:]
    message = refusal(read_rows, write(tmp_path / "a.jsonl", '{"a": 1}\n' + json.dumps({"a": "x" * 30})))
    assert message.startswith(f"{file}:2: the line is longer than 30 bytes")


def test_memory_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_parse_json", Mock(side_effect=MemoryError))
    lines, whole = write(tmp_path / "a.jsonl", "{}\n"), write(tmp_path / "a.json", "[]")
    assert refusal(read_rows, lines) == f"{lines}: the file does not fit into memory; give a smaller file"
    assert refusal(read_rows, whole).startswith(f"{whole}: the file needs more than 268,435,")


# Rules for texts ---------------------------------------------------------------------------------------------------


def one_line_before(text: str) -> str:
    return re.sub(r"\s*[\r\n]\s*", " ", text.strip())


def clean_before(text: str) -> str:
    """lm-evaluation-harness, lm_eval/tasks/hellaswag/utils.py, preprocess."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def cut_before(text: str) -> int | None:
    place = text.find("\n")
    while place >= 0 and not (text[:place] + "\n").strip():
        place = text.find("\n", place + 1)
    return place if place >= 0 else None


@pytest.mark.parametrize(
    ("rule", "before", "parts"),
    [
        (without_line_breaks, one_line_before, ["a", " ", "\n", "\r", "\t", "\x0b", "\u3000", "\u2028", "\x1c"]),
        (clean, clean_before, ["a", "[", "]", "\n", " ", " [title]", "\r", "\u2028"]),
        (lambda text: _cut(text, "\n"), cut_before, ["a", " ", "\n", "\r", "\u3000"]),
    ],
    ids=["one line", "brackets", "stop"],
)
def test_a_linear_rule_is_the_plain_one(
    rule: Callable[[str], Any], before: Callable[[str], Any], parts: list[str]
) -> None:
    texts = random_texts(parts, 40_000, 12)
    assert sum(rule(text) != text for text in texts) > 4000
    for text in texts:
        assert rule(text) == before(text), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        *(" ", "\n", "[", "[]", " a", "#### 1", "-1,", "the ", "a.", "&"),
        *(pytest.param(text, marks=pytest.mark.slow) for text in ("]", "[\n", " \n", "#", "a", "y")),
    ],
)
def test_a_megabyte_takes_seconds_at_most(text: str) -> None:
    long = f"x{text * (MEGABYTE // len(text))}x"
    for rule in (without_line_breaks, clean, lambda text: _cut(text, "\n")):
        with bounded():
            rule(long)
    for name, metric in METRICS.items():
        # The libraries that cut these two into words are linear too, but take microseconds for a character.
        reference = long[: MEGABYTE // 5] if name in ("bleu", "rougeL") else long
        example = Example("p", " x", "r:1", references=(reference, "#### 12"), choices=(reference, "other"))
        with bounded():
            metric.sample(Answer("the answer is #### 12", example, (0.0, -1.0)))


def test_rows_of_a_megabyte(tmp_path: Path) -> None:
    summary = write(tmp_path / "a.jsonl", json.dumps({"dialogue": "a", "summary": "a" + " " * MEGABYTE + "b"}))
    row = {"activity_label": "a", "ctx_a": "[" * MEGABYTE, "ctx_b": "", "endings": ["a", "b"], "label": 1}
    endings = write(tmp_path / "b.jsonl", json.dumps(row))
    for task, file, wanted in (("dialogsum", summary, MEGABYTE + 3), ("hellaswag", endings, 2)):
        with bounded():
            (sample,) = load_split(task, "test", files={"test": file}, seed=0)
        assert len(sample.completion) == wanted
    assert sample.prompt == "a: " + "[" * MEGABYTE


# Tokenizers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(tmp_path: Path) -> Any:
    return load_tokenizer(write_tiny_tokenizer(tmp_path / "tokenizer"))


def with_rule(folder: Path, pattern: str, place: str) -> Path:
    """A tokenizer with a rule of a stranger's regular expression."""
    file = write_tiny_tokenizer(folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "b"}
    if place == "decoder":
        content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], {"type": "Fuse"}, replace]}
    elif place == "normalizer":
        content["normalizer"] = replace
    else:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer", "decoder"])
def test_a_regular_expression_that_gives_up_is_one_line(tmp_path: Path, place: str) -> None:
    """Its library panics, which Python sees as a BaseException of a class that nothing else has."""
    folder = with_rule(tmp_path / "tokenizer", "(a|aa)+c", place)
    tokenizer = load_tokenizer(folder)

    def use() -> None:
        (ids,), _ = encode_prompts(tokenizer, [Example("a" * 60, "", "here")], max_length=256)
        decode_ids(tokenizer, ids.tolist())

    with bounded():
        message = refusal(use)
    said = "the tokenizer cannot decode some token ids" if place == "decoder" else "cannot encode a text"
    assert message.startswith(f"{folder}: {said} (") and "--tokenizer" in message


@pytest.mark.parametrize("pattern", ["(", "(a|aa)+c", "[z-a]", r"\p{Nothing}"])
def test_a_regular_expression_that_cannot_be_used_is_refused_at_once(tmp_path: Path, pattern: str) -> None:
    folder = with_rule(tmp_path / "tokenizer", pattern, "pre_tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 60}  # for the second one
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with bounded():
        found = outcome(lambda: load_tokenizer(folder), unchanged=tmp_path, names=(str(folder),))
    assert isinstance(found, UserError) and "cannot be read as a tokenizer (" in str(found)


class Stop(BaseException):
    """Stands for a run's stop."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stop, GeneratorExit])
def test_what_ends_a_run_is_no_library_s_error(error: type[BaseException]) -> None:
    with pytest.raises(error), tokenizer_errors("a", "fails"):
        raise error
    with pytest.raises(UserError, match=r"^a: fails \(ValueError\); give"), tokenizer_errors("a", "fails"):
        raise ValueError


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "x.model", "vocab.json",
                                  "chat_template.jinja", "additional_chat_templates/a.jinja"])  # fmt: skip
def test_a_tokenizer_s_file_of_gigabytes_is_not_read(tmp_path: Path, name: str) -> None:
    folder = write_tiny_tokenizer(tmp_path / "tokenizer")
    (folder / name).parent.mkdir(exist_ok=True)
    sparse(folder / name, 2**36)
    places = [folder, folder / name] if name.endswith(".model") else [folder]
    for place in places:
        with bounded():
            message = refusal(load_tokenizer, place)
        assert message.startswith(f"{folder / name}: is larger than 134,217,728 bytes")


def test_a_model_that_sentencepiece_cannot_use(tmp_path: Path) -> None:
    for content in (b"", b"\0" * 1000, b"\x0a\xff\xff\xff\xff\x0f" + b"x" * 100):
        file = tmp_path / "tokenizer.model"
        file.write_bytes(content)
        assert f"{file}: is not a SentencePiece model" in refusal(load_tokenizer, file)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {2}), (5, {2, 5}), ([5, 6, 5], {2, 5, 6}), ([], {2}), (319, {2, 319}), (320, {2}), (-1, {2}),
        ([5, 10**30, -(10**30), 2**63], {2, 5}), (True, None), ([5, False], None), ("5", None), (5.0, None),
        ([[5]], None), ({"a": 5}, None), ([None], None),
    ],
)  # fmt: skip
def test_end_ids_are_ids_of_the_model(tmp_path: Path, chat: Any, given: Any, expected: set[int] | None) -> None:
    assert chat.eos_token_id == 2
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    found = outcome(lambda: end_ids(chat, tmp_path, vocab_size=320), unchanged=tmp_path, names=("eos_token_id = ",))
    assert isinstance(found, UserError) if expected is None else found == expected


# Hosts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", ["2(x999999999)", "1(x1000001)", ",".join(["1(x999999)"] * 9), "9" * 5000, "٣",
                                   "1(x)", "2,", "", "2(x-1)", "1(x" + "9" * 5000 + ")"], ids=range(10))  # fmt: skip
def test_tasks_of_a_slurm_job_beyond_any_cluster(tasks: str) -> None:
    environment = {"SLURM_JOB_NODELIST": "a,b", "SLURM_TASKS_PER_NODE": tasks}
    with bounded():
        message = refusal(slurm_hosts, environment)
    assert "SLURM_TASKS_PER_NODE" in message or not tasks
