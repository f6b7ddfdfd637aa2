"""Chats of families: what ends an answer, what their templates refuse, and the tokenizer of a multimodal folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import family_templates as families
from support.task_files import refusal, write_rows
from support.zoo_oracle import CHATML, EOS, SPECIAL, answer, user, write_zoo_tokenizer

from megatron_tiedlora.data.cache import tokenised_once
from megatron_tiedlora.data.chat_template import render_with_spans
from megatron_tiedlora.data.splits import Encoding, load_split
from megatron_tiedlora.data.task import Reading
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer, tokenizer_hash
from megatron_tiedlora.evaluation.answering import ScoredSet, encode_scored

Row = dict[str, Any]
ONE = [user("Hello."), answer("How are you?")]
TWO = [*ONE, user("thanks"), answer("fine.")]
SYSTEM: Row = {"role": "system", "content": "Be brief."}
EOS_ID = SPECIAL.index(EOS)


def encoding(tokenizer: Any, *, vocab_size: int = 600, **reading: Any) -> Encoding:
    ends = frozenset([EOS_ID])
    return Encoding(get_task("custom"), tokenizer, Reading(**reading), 200, ends, vocab_size)


def scored(folder: Path, how: Encoding, *rows: Row) -> ScoredSet:
    files = {"test": write_rows(folder / "rows.jsonl", list(rows))}
    examples = load_split("custom", "test", files=files, seed=0, tokenizer=how.tokenizer, reading=how.reading)
    return encode_scored(examples, how, max_new_tokens=8, batch_size=2)


# The ends of answers ------------------------------------------------------------------------------------------------

ENDED = (
    "{% for m in messages %}{{ m.content + '<|turn|>\n' }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|turn|>\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (families.GEMMA2, {"<end_of_turn>"}),
        (families.GLM4, set()),
        (families.GRANITE, set()),
        (families.OLMO3, set()),
        (ENDED, {"<|turn|>"}),
        (MARKED, {"<|turn|>"}),
    ],
)
def test_decoding_also_stops_at_what_the_template_ends_answers_with(
    template: str, ends: set[str], tmp_path: Path
) -> None:
    """At each of several tokens, also where they are not learned; tokens at other places end nothing."""
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "a", template=template))
    rows = {"messages": TWO}, {"messages": ONE}
    found = scored(tmp_path, encoding(tokenizer), *rows)
    assert found.encoding.end_ids == {EOS_ID, *map(SPECIAL.index, ends)}
    plain = {"prompt": "Hello.", "completion": "fine."}
    assert scored(tmp_path, encoding(tokenizer), plain).encoding.end_ids == {EOS_ID}
    tokenizer.chat_template = None
    assert scored(tmp_path, encoding(tokenizer), *rows).encoding.end_ids == {EOS_ID}


@pytest.mark.parametrize("meaning", ["plain", "control"])
def test_an_answer_that_spells_a_control_token_names_no_end(meaning: str, tmp_path: Path) -> None:
    """Where it is tokenised as text; and where it is that token but something follows."""
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "a", template=families.GEMMA2))
    row = {"messages": [user("Hello."), answer("fine<image>" + (" x" if meaning == "control" else ""))]}
    found = scored(tmp_path, encoding(tokenizer, special_tokens=meaning), row)
    assert found.encoding.end_ids == {EOS_ID, SPECIAL.index("<end_of_turn>")}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [5, 6]}, "config.json": {"eos_token_id": 7}}, {5, 6}),
        ({"generation_config.json": {"eos_token_id": 5}}, {5}),
        ({"generation_config.json": {"top_k": 64}, "config.json": {"eos_token_id": [7, 8, 600]}}, {7, 8}),
        ({"config.json": {"eos_token_id": None, "text_config": {"eos_token_id": [8, 9]}}}, {8, 9}),
        ({"config.json": {"eos_token_id": 7, "text_config": {"eos_token_id": [8, 9]}}}, {7}),
        ({"config.json": {"text_config": {"eos_token_id": 9}}}, {9}),
        ({"config.json": {"text_config": "x"}}, set()),
        ({}, set()),
        ({"config.json": {"text_config": {"eos_token_id": "9"}}}, "config.json: eos_token_id = '9'"),
        ({"config.json": {"eos_token_id": [7, True]}}, "config.json: eos_token_id = [7, True]"),
        ({"generation_config.json": {"eos_token_id": [[5]]}}, "generation_config.json: eos_token_id = [[5]]"),
    ],
)
def test_the_model_s_end_ids_are_those_that_transformers_reads(
    files: dict[str, Row], expected: set[int] | str, tmp_path: Path
) -> None:
    """Of its generation config, else of its config, else of the config of the text model in it."""
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "a"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if isinstance(expected, str):
        assert expected in refusal(lambda: end_ids(tokenizer, tmp_path, vocab_size=600))
    else:
        assert end_ids(tokenizer, tmp_path, vocab_size=600) == {EOS_ID, *expected}


# Turns --------------------------------------------------------------------------------------------------------------


def test_an_earlier_answer_whose_end_is_another_is_supervised_without_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path, template=families.OLMO3))
    whole, spans = render_with_spans(tokenizer, TWO, None, [1, 3], names="abcd")
    assert [whole[slice(*span)] for span in spans] == ["How are you?", f"fine.{EOS}"]
    assert f"How are you?<|turn|>\n<|im_start|>user\nthanks<|turn|>\n<|im_start|>assistant\nfine.{EOS}" in whole


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (families.GEMMA2, [SYSTEM, *ONE], "no turn may be a system turn"),
        (families.GEMMA3, [user(), user(), answer()], "turns are out of order"),
        (families.MISTRAL_SMALL, [user(), answer(), {"role": "tool", "content": "3"}, answer()], "role 'tool'"),
        (families.GEMMA3, [user("a <image> b"), answer()], "the text contains '<image>', a control token"),
        (families.GEMMA3, [user([{"type": "image"}, {"type": "text", "text": "b"}]), answer()], "type 'image'"),
        (families.GEMMA3, [{**SYSTEM, "functions": "[add]"}, *ONE], "'functions' is not read by"),
        (CHATML, [user(), {"role": "assistant", "function_calls": "add()"}], "'function_calls' is not read by"),
        (families.OLMO3, [user(), {"role": "assistant", "function_calls": "<sop>"}], "field 'function_calls' contains"),
    ],
)
def test_what_a_template_cannot_write_is_one_line(
    template: str, messages: list[Row], expected: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "a", template=template))
    message = refusal(lambda: scored(tmp_path, encoding(tokenizer), {"messages": messages}))
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}:1") and expected in message


# Multimodal folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def multimodal(tmp_path: Path) -> Path:
    """A tokenizer with the files of a processor, whose template is in a file of its own."""
    folder = write_zoo_tokenizer(tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {"image_token": "<image>", "processor_class": "Gemma3Processor", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **named}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": families.GEMMA3}))
    for name in ("processor_config", "preprocessor_config"):
        (folder / f"{name}.json").write_text(json.dumps({"processor_class": "Gemma3Processor", "image_seq_length": 4}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"eos_token_id": [2, 6]}}))
    return folder


def test_the_tokenizer_of_a_multimodal_folder_has_the_processor_s_template(multimodal: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(multimodal)
    assert tokenizer.chat_template == families.GEMMA3 and tokenizer.pad_token_id == 0
    assert end_ids(tokenizer, multimodal, vocab_size=600) == {2, 6}
    assert tokenizer.encode("<image>", add_special_tokens=False) == [SPECIAL.index("<image>")]
    of_json = tokenizer_hash(multimodal)
    (multimodal / "chat_template.json").rename(tmp_path / "chat_template.json")
    assert load_tokenizer(multimodal).chat_template is None and tokenizer_hash(multimodal) != of_json
    (multimodal / "chat_template.jinja").write_text(families.GEMMA3)
    assert load_tokenizer(multimodal).chat_template == families.GEMMA3 and tokenizer_hash(multimodal) == of_json
    (multimodal / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert load_tokenizer(multimodal).chat_template == families.GEMMA3, "the tokenizer's own comes first"


@pytest.mark.parametrize("content", ['{"chat_template": 3}', "{", '["x"]', '{"chat_template": ["x"]}'])
def test_a_processor_s_template_that_is_none_is_one_line(multimodal: Path, content: str) -> None:
    (multimodal / "chat_template.json").write_text(content)
    assert refusal(lambda: load_tokenizer(multimodal)).startswith(f"{multimodal / 'chat_template.json'}: ")
    assert "chat_template.json: " in refusal(lambda: tokenizer_hash(multimodal))


def test_a_control_token_may_have_no_row_in_the_embedding_until_a_text_has_it(tmp_path: Path) -> None:
    """As the token of images in Gemma 3's tokenizer, for models that read only text."""
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "model", template=CHATML))
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<soft>"]})
    check_vocabulary(tokenizer, rows)
    row = {"messages": [user("a <soft> b"), answer("Yo")]}
    file = write_rows(tmp_path / "train.jsonl", [{"messages": ONE}] * 9 + [row])

    def sizes(how: Encoding) -> list[int]:
        dataset = tokenised_once(how, files={"train": file}, seed=0, cache_dir=tmp_path / how.reading.special_tokens)
        assert scored(tmp_path, how, row).prompts
        return dataset.train.tokens.tolist()

    how = encoding(tokenizer, vocab_size=rows, special_tokens="control")
    message = refusal(lambda: sizes(how))
    said = "no embedding for '<soft>'; remove it"
    assert message == f"{file}:10: {said}"
    assert refusal(lambda: scored(tmp_path, how, row)) == f"{tmp_path / 'rows.jsonl'}:1: {said}"
    assert max(sizes(encoding(tokenizer, vocab_size=rows + 1, special_tokens="control"))) == rows
    assert refusal(lambda: sizes(how)) == message, "also of cached rows"
    assert max(sizes(encoding(tokenizer, vocab_size=rows, special_tokens="plain"))) < rows
    tokenizer.pad_token = "<soft>"
    assert "'<soft>'" in refusal(lambda: check_vocabulary(tokenizer, rows))
    tokenizer.pad_token = None
    tokenizer.add_tokens(["ordinary"])
    assert "'ordinary'" in refusal(lambda: check_vocabulary(tokenizer, rows))
