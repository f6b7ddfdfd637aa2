"""Chat templates, which are programs of a stranger: each has an end, in time and in memory. Where answers are in what
they render, also if a last turn is written in another way than an earlier one; and which names they read."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from fuzzing import bounded
from support.task_files import refusal
from support.tiny_models import write_tiny_tokenizer
from support.zoo_oracle import MARKED, TOOLS, write_zoo_tokenizer

from megatron_tiedlora.data import chat_template
from megatron_tiedlora.data.chat_template import ChatTemplate, TurnsChange, render_with_spans, template_names
from megatron_tiedlora.data.tokenizer import load_tokenizer

# The end of a template ----------------------------------------------------------------------------------------------

MEGABYTE = 2**20
GROWING = "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
BOMBS = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
    "repeated": ("{{ 'x' * 10**9 }}", "more than 268,435,456 bytes"),
    "repeated in a loop": ("{% for a in range(99999) %}{% set x = 'x' * 10**8 %}{% endfor %}", "more than"),
    "power": ("{{ 9**(10**8) > 1 }}", "more than 0.2 s"),
    "doubled": (GROWING + "{{ ns.x|length }}", "more than 268,435,456 bytes"),
    "printed": ("{% for a in range(99999) %}{% for b in range(999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}", "more"),
    "padded": ("{{ '%9999999999d'|format(1) }}", "more than 268,435,456 bytes"),
    "replaced": ("{{ ('x' * 10**8)|replace('x', 'xxxx') }}", "more than"),
    "long": ("{{ 'x' * 300000 }}", "produces 300,000 characters from these messages (the limit is 100,140)"),
    "compared": (
        "{% set a = messages[0].content * 400000 %}{% set b = messages[0].content * 400000 %}"
        "{{ ([a] * 3000000) == ([b] * 3000000) }}",
        "more than 0.2 s",
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
    if "1 s" not in said and "bytes" not in said:  # how long it may take does not matter
        monkeypatch.setattr(chat_template, "_SECONDS", 0.2)
    children = psutil.Process().children()
    started = time.monotonic()
    with closing(ChatTemplate(chat)) as template:
        with bounded():
            message = refusal(lambda: template.render(TURNS, "a.jsonl:1", answers=(), names=()))
        assert time.monotonic() - started < 30  # of a busy machine
        assert message.startswith(f"a.jsonl:1: the chat template of {tmp_path / 'tokenizer'} ") and said in message
        monkeypatch.setattr(chat_template, "_SECONDS", 0.1)  # what ends the second one does not matter
        assert refusal(lambda: template.render(TURNS, "a.jsonl:2", answers=(), names=())).startswith("a.jsonl:2: ")
    assert psutil.Process().children() == children
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_long_conversation_is_rendered(chat: Any) -> None:
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    turns = [{"role": "user", "content": "x\ud800" + "é" * MEGABYTE}] * 5
    with closing(ChatTemplate(chat)) as template:
        for _ in range(3):
            expected = f"<user>{turns[0]['content']}" * 5 + "<assistant>"
            assert template.render(turns, "a.jsonl:1", answers=(), names=())[0] == expected


def test_a_process_that_is_killed_is_told_and_replaced(chat: Any) -> None:
    chat.chat_template, before = "{{ messages[0].content }}", psutil.Process().children()
    with closing(ChatTemplate(chat)) as template:
        assert template.render(TURNS, "a.jsonl:1", answers=(), names=())[0] == "How many?!"
        (process,) = (child for child in psutil.Process().children() if child not in before)
        process.kill()
        assert "ended its process" in refusal(lambda: template.render(TURNS, "a.jsonl:2", answers=(), names=()))
        assert template.render(TURNS, "a.jsonl:3", answers=(), names=())[0] == "How many?!"


def test_a_template_s_process_ends_with_ours(chat: Any) -> None:
    """Also where it is busy for ever and ours is killed."""
    chat.chat_template = BOMBS["power"][0]
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe()

    def work() -> None:
        with closing(ChatTemplate(chat)) as template:
            writer.send(template._start()[0].pid)
            template.render(TURNS, "a.jsonl:1", answers=(), names=())

    ours = context.Process(target=work)
    ours.start()
    theirs = psutil.Process(reader.recv())
    time.sleep(0.3)
    ours.kill()
    ours.join(10)
    theirs.wait(10)


# The spans of answers -----------------------------------------------------------------------------------------------


class OpensThoughts:
    """A template that starts an answer with an open thought, and writes past answers without one."""

    def get_chat_template(self, **_: Any) -> str:
        return "written in Python below"

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool, **_: Any
    ) -> str:
        assert not tokenize
        turns = [
            f"<A>{message['content']}<eos>" if message["role"] == "assistant" else f"<U>{message['content']}"
            for message in messages
        ]
        return "".join(turns) + ("<A><think>\n" if add_generation_prompt else "")


@pytest.mark.parametrize("text", ["<html>hi</html>", "<table>", "<think>\nno", "plain", "<A>", "<"])
def test_an_answer_that_begins_like_the_open_thought(text: str) -> None:
    """What both have in common is a part of the answer."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text},
                {"role": "user", "content": "<html>"}, {"role": "assistant", "content": text}]  # fmt: skip
    whole, spans = render_with_spans(OpensThoughts(), messages, None, [1, 3], names="abcd")
    expected = f"{text}<eos>" if not text.startswith("<think>\n") else "no<eos>"
    assert [whole[slice(*span)] for span in spans] == [expected, expected]


# As Phi-3's template: an end-of-sequence token after the whole, whoever spoke last.
ENDED = (
    "{% for m in messages %}{{ '<' + m.role + '>'  + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ eos_token }}{% endif %}"
)
# As TRL's for training: this token is marked too.
MARKS_THE_END = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% elif messages[-1].role == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
)
# A thought and a text marked apart, with something between them that is not: the renderings are compared.
APART = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}{{ 'hm' }}"
    "{% endgeneration %}:{% generation %}{{ m.content }}{% endgeneration %}{{ '<end>' }}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# A thought before the last answer only.
THOUGHT = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "two"}]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ENDED, ["one<end>", "two<end><|im_end|>"]),
        (MARKS_THE_END, ["one", "two<|im_end|>"]),
        (APART, ["hm:one<end>", "hm:two<end>"]),
        (THOUGHT, ["one<end>", "<think></think>two<end>"]),
    ],
)
def test_the_end_of_the_whole_is_no_part_of_an_earlier_answer(
    template: str, expected: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path, template=template))
    whole, spans = render_with_spans(tokenizer, CHAT, None, [1, 3], names="abcd")
    assert [whole[slice(*span)] for span in spans] == expected
    assert render_with_spans(tokenizer, CHAT, None, [3], names="abcd") == (whole, spans[1:])


def test_a_thought_that_is_left_out_of_earlier_turns_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path, template=THOUGHT))
    thinks = [CHAT[0], {**CHAT[1], "reasoning_content": "hm"}, *CHAT[2:]]
    with pytest.raises(TurnsChange, match=r"writes the second turn \('one'\) differently"):
        render_with_spans(tokenizer, thinks, None, [1], names=["the first turn", "the second turn", "", ""])
    assert len(render_with_spans(tokenizer, thinks, None, [3], names="abcd")[1]) == 1


# Names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "variables", "fields", "constants"),
    [
        ("{% if tools %}{{ tools | tojson }}{% endif %}", {"tools"}, set(), set()),
        ("{# tools #}tools {{ 'tools' }}{% set tools = 1 %}{{ f(tools=1) }}", {"f"}, set(), set()),
        ("{% raw %}{{ tools }}{% endraw %}{{ builtin_tools }}", {"builtin_tools"}, set(), set()),
        ("{{ m.tool_calls }}", {"m"}, {"tool_calls"}, set()),
        ("{{ m['tool_calls'] }}", {"m"}, {"tool_calls"}, {"tool_calls"}),
        ("{% if 'thinking' in m %}{% endif %}", {"m"}, {"thinking"}, {"thinking"}),
        ("{{ m.get('thinking') }}", {"m"}, {"get", "thinking"}, {"thinking"}),
        ("{% if m.role in ['tool', 'ipython'] %}{% endif %}", {"m"}, {"role", "tool", "ipython"}, {"tool", "ipython"}),
        ("{{ {'tool': 'x'}[m.role] + 'critic' }}{{ 'a' ~ 'b' }}", {"m"}, {"role", "tool", "x"}, {"tool", "x"}),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}", {"messages", "loop"},
         {"first"}, set()),
        ("{%- macro f(tools) -%}{% generation %}{{ tools }}{% endgeneration %}{%- endmacro -%}", {"tools"}, set(),
         set()),
    ],
)  # fmt: skip
def test_names_are_those_of_the_syntax(text: str, variables: set[str], fields: set[str], constants: set[str]) -> None:
    found = template_names(text)
    assert (found.variables, found.fields, found.constants) == (variables, fields, constants)


def test_names_of_whole_templates() -> None:
    tools = template_names(TOOLS)
    assert "tools" in tools.variables and "tool_calls" in tools.fields and tools.constants == {"tool"}
    assert template_names(MARKED).constants == {"assistant"}
