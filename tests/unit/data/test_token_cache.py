"""The cache of tokenised data: its samples are those of the rows, it is read by nobody twice, and it is mapped."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_files import write_rows
from token_rows import WORDS, chats, check, check_same, encoding, rows
from zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data import cache
from megatron_tiedlora.data.cache import TrainingData, cache_key, tokenised_once
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Reading
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import load_tokenizer

# What is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 5])
def test_a_file_from_which_validation_rows_are_taken(tokenizer: Any, tmp_path: Path, processes: str, seed: int) -> None:
    files = {"train": write_rows(tmp_path / "a.jsonl", rows(40))}
    found = check(encoding(tokenizer), files, tmp_path, seed=seed)
    assert (len(found.train), len(found.validation)) == (38, 2) and not found.chats and not found.mix
    assert len(list((tmp_path / "tokens").glob("*/content.json"))) == 2


def test_several_files_with_weights(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows(20)), write_rows(tmp_path / "b.json", rows(7, first=50))
    given = f"{a}:0.25,{b}:0.75"
    found = check(encoding(tokenizer), {"train": given, "validation": a}, tmp_path)
    assert found.mix == (f"{a}: 20 rows make 20 samples, 1.00 of each", f"{b}: 7 rows make 60 samples, 8.57 of each")
    check(encoding(tokenizer), {"train": given}, tmp_path)


def test_chats_that_lose_turns(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    files = {"train": write_rows(tmp_path / "a.jsonl", chats(30))}
    found = check(encoding(tokenizer, max_length=26), files, tmp_path)
    assert found.chats and not found.unended and found.train.shortened_chats > 0 and found.train.lost_turns > 0
    assert check(encoding(tokenizer, max_length=400), files, tmp_path).train.prompt_lengths is None
    single = [row for row in chats(40) if len(row["messages"]) == 2]  # a block of them has nothing but last answers
    files = {"train": write_rows(tmp_path / "b.jsonl", [*single, *chats(9)]), "validation": files["train"]}
    check(encoding(tokenizer, max_length=400), files, tmp_path)


def test_long_texts_become_several_samples(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    texts = [{"text": " ".join(WORDS * (1 + number % 5))} for number in range(30)]
    found = check(encoding(tokenizer, max_length=16), {"train": write_rows(tmp_path / "a.jsonl", texts)}, tmp_path)
    assert len(found.train) + len(found.validation) > 60
    a = write_rows(tmp_path / "b.jsonl", texts[:3])
    check(encoding(tokenizer, max_length=16), {"train": f"{tmp_path}/a.jsonl:0.5,{a}:0.5"}, tmp_path)


def test_rows_of_one_sample_stay_together(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    talks = [{"dialogue": f"talk {number // 2}", "summary": WORDS[number % 10]} for number in range(40)]
    merge_by = get_task("dialogsum").merge_by
    assert merge_by is not None
    talks = [{**row, merge_by: f"{number // 2}"} for number, row in enumerate(talks)]
    how = replace(encoding(tokenizer, "dialogsum", max_length=200))
    file = write_rows(tmp_path / "a.jsonl", talks)
    for files in ({"train": file}, {"train": file, "validation": file}):
        found = check(how, files, tmp_path)
    assert (len(found.train), len(found.validation)) == (40, 20)


def test_aligned_texts_and_a_prompt_template(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    (tmp_path / "t.de").write_text("".join(f"Satz {number}\n" for number in range(25)))
    (tmp_path / "t.en").write_text("".join(f"sentence {number}\n" for number in range(25)))
    files = {"train": f"{tmp_path}/t.de,{tmp_path}/t.en"}
    check(encoding(tokenizer, "iwslt2017", max_length=200), files, tmp_path)
    (tmp_path / "t.en").write_text("".join(f"phrase {number}\n" for number in range(25)))
    check(encoding(tokenizer, "iwslt2017", max_length=200), files, tmp_path)
    with_own = encoding(tokenizer, template="Q: {prompt}", max_length=400)
    files = {"train": write_rows(tmp_path / "c.jsonl", rows(9))}
    samples = load_split("custom", "train", files=files, seed=3, reading=Reading(template="Q: {prompt}"))
    found = tokenised_once(with_own, files=files, seed=3, cache_dir=tmp_path)
    texts = [tokenizer.decode(found.train.sample(index), skip_special_tokens=True) for index in range(len(found.train))]
    assert all(text.startswith(sample.prompt) for text, sample in zip(texts, samples, strict=True))


def test_a_template_that_never_ends_an_answer_is_noticed(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    files = {"train": write_rows(tmp_path / "a.jsonl", chats(8))}
    never = replace(encoding(tokenizer), end_ids=frozenset([tokenizer.bos_token_id]))
    assert tokenised_once(never, files=files, seed=0, cache_dir=tmp_path).unended
    plain = {"train": write_rows(tmp_path / "b.jsonl", rows(8))}
    assert not tokenised_once(never, files=plain, seed=0, cache_dir=tmp_path).unended


# Reading it -------------------------------------------------------------------------------------------------------


def test_a_second_start_reads_no_rows_and_maps_the_files(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, files = encoding(tokenizer), {"train": write_rows(tmp_path / "a.jsonl", rows(40))}
    first = tokenised_once(how, files=files, seed=3, cache_dir=tmp_path)
    assert not list((tmp_path / "tokens").glob(".writing-*"))
    made = []
    monkeypatch.setattr(cache, "encoded_rows", lambda *_: pytest.fail("tokenised twice"))
    monkeypatch.setattr(cache, "_write_splits", lambda path, *_, **__: made.append(path))
    again = tokenised_once(how, files=files, seed=3, cache_dir=tmp_path)
    check_same(again.train, first.train)
    assert again.sha256 == first.sha256 and again.first_row == first.first_row
    for array in (again.train.tokens, again.train.supervised, again.train.offsets, again.train.order):
        assert array is not None and _is_mapped(array)
    with pytest.raises(UserError, match="was damaged right after"):  # another seed shares the rows
        tokenised_once(how, files=files, seed=4, cache_dir=tmp_path)
    assert len(made) == 1


def _is_mapped(array: np.ndarray[Any, Any]) -> bool:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    return base is not None and not array.flags.writeable


def test_damaged_files_are_written_again(tokenizer: Any, tmp_path: Path) -> None:
    how, files = encoding(tokenizer), {"train": write_rows(tmp_path / "a.jsonl", rows(40))}

    def tokens() -> TrainingData:
        return tokenised_once(how, files=files, seed=3, cache_dir=tmp_path)

    first = tokens()
    paths = sorted((tmp_path / "tokens").glob("*/*"))
    assert len(paths) == 4 + 1 + 2 + 1
    for path in paths:
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]):
            path.write_bytes(damaged)
            check_same(tokens().train, first.train)
            assert path.read_bytes() == whole or path.name == "content.json"
        path.unlink()
        os.mkfifo(path)
        check_same(tokens().validation, first.validation)


def test_the_key_covers_what_the_ids_depend_on(tokenizer: Any, tmp_path: Path) -> None:
    base = encoding(tokenizer)
    other_tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "other", template=CHATML))
    assert cache_key(base, "x") == cache_key(encoding(other_tokenizer), "x")
    other_tokenizer.chat_template = "{{ messages }}"
    others = [
        cache_key(base, "y"),
        cache_key(encoding(other_tokenizer), "x"),
        cache_key(encoding(tokenizer, "gsm8k"), "x"),
        cache_key(encoding(tokenizer, max_length=41), "x"),
        *(cache_key(encoding(tokenizer, template=template), "x") for template in ("{prompt}", "Q: {prompt}")),
        cache_key(replace(base, end_ids=frozenset([1, 2])), "x"),
        *(cache_key(replace(base, reading=replace(base.reading, **change)), "x") for change in CHANGES),
    ]
    assert len({cache_key(base, "x"), *others}) == len(others) + 1


CHANGES: list[dict[str, Any]] = [
    {"columns": {"prompt": "query"}},
    {"columns": {"prompt": "question"}},
    {"train_on": "last_turn"},
    {"add_bos": "true"},
    {"special_tokens": "plain"},
]


def test_every_choice_of_the_user_is_in_the_key() -> None:
    names = {name for change in CHANGES for name in change}
    # The chat template's text is a part of the tokenizer's, another --prompt_template is another key (above), and only
    # what is trained on is stored.
    assert names | {"chat_template", "template", "trains"} == set(Reading.__dataclass_fields__)
