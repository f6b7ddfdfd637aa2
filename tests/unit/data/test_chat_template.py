"""Chat templates, which are programs of a stranger: each has an end, in time and in memory."""

from __future__ import annotations

import multiprocessing
import resource
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from fuzzing import bounded
from task_files import refusal
from tiny_models import write_tiny_tokenizer

from megatron_tiedlora.data import chat_template
from megatron_tiedlora.data.chat_template import ChatTemplate
from megatron_tiedlora.data.tokenizer import load_tokenizer

MEGABYTE = 2**20
GROWING = "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
BOMBS = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
    "repeated": ("{{ 'x' * 10**9 }}", "more than 268,435,456 bytes"),
    "repeated in a loop": ("{% for a in range(99999) %}{% set x = 'x' * 10**8 %}{% endfor %}", "more than"),
    "power": ("{{ 9**(10**8) > 1 }}", "more than 1 s"),
    "doubled": (GROWING + "{{ ns.x|length }}", "more than 268,435,456 bytes"),
    "printed": ("{% for a in range(99999) %}{% for b in range(999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}", "more"),
    "padded": ("{{ '%9999999999d'|format(1) }}", "more than 268,435,456 bytes"),
    "replaced": ("{{ ('x' * 10**8)|replace('x', 'xxxx') }}", "more than"),
    "long": ("{{ 'x' * 300000 }}", "makes 300,000 characters from these messages (the limit is 100,140)"),
    "compared": (
        "{% set a = messages[0].content * 400000 %}{% set b = messages[0].content * 400000 %}"
        "{{ ([a] * 3000000) == ([b] * 3000000) }}",
        "more than 1 s",
    ),
    "replaced often": ("{{ ('a' * 500)" + "|replace('a', 'aa')" * 60 + " }}", "more than"),
    "for ever in itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
}
TURNS = [{"role": "user", "content": "How many?!"}]


@pytest.fixture
def chat(tmp_path: Path) -> Any:
    return load_tokenizer(write_tiny_tokenizer(tmp_path / "tokenizer"))


@pytest.mark.parametrize("name", BOMBS)
def test_a_chat_template_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: Any, name: str) -> None:
    """Whatever it does; the conversations after it are answered, by a process of their own, and none is left."""
    chat.chat_template, said = BOMBS[name]
    children = psutil.Process().children()
    started = time.monotonic()
    with closing(ChatTemplate(chat)) as template:
        with bounded():
            message = refusal(lambda: template.render(TURNS, "a.jsonl:1", answers=()))
        assert time.monotonic() - started < 30  # of a busy machine
        assert message.startswith(f"a.jsonl:1: the chat template of {tmp_path / 'tokenizer'} ") and said in message
        monkeypatch.setattr(chat_template, "_SECONDS", 0.1)  # what ends the second one does not matter
        assert refusal(lambda: template.render(TURNS, "a.jsonl:2", answers=())).startswith("a.jsonl:2: ")
    assert psutil.Process().children() == children
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_long_conversation_is_rendered(chat: Any) -> None:
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    turns = [{"role": "user", "content": "x\ud800" + "é" * MEGABYTE}] * 5
    with closing(ChatTemplate(chat)) as template:
        for _ in range(3):
            expected = f"<user>{turns[0]['content']}" * 5 + "<assistant>"
            assert template.render(turns, "a.jsonl:1", answers=()).text == expected


def test_a_process_that_is_killed_is_told_and_replaced(chat: Any) -> None:
    chat.chat_template, before = "{{ messages[0].content }}", psutil.Process().children()
    with closing(ChatTemplate(chat)) as template:
        assert template.render(TURNS, "a.jsonl:1", answers=()).text == "How many?!"
        (process,) = (child for child in psutil.Process().children() if child not in before)
        process.kill()
        assert "ended its process" in refusal(lambda: template.render(TURNS, "a.jsonl:2", answers=()))
        assert template.render(TURNS, "a.jsonl:3", answers=()).text == "How many?!"


def test_a_template_s_process_ends_with_ours(chat: Any) -> None:
    """Also where it is busy for ever and ours is killed."""
    chat.chat_template = BOMBS["power"][0]
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe()

    def work() -> None:
        with closing(ChatTemplate(chat)) as template:
            template._start()
            assert template._process is not None
            writer.send(template._process.pid)
            template.render(TURNS, "a.jsonl:1", answers=())

    ours = context.Process(target=work)
    ours.start()
    theirs = psutil.Process(reader.recv())
    time.sleep(0.3)
    ours.kill()
    ours.join(10)
    theirs.wait(10)
