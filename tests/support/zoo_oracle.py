"""What a row's ids and labels should be, computed apart from the package: Jinja and `tokenizers`, and nothing else.

A conversation is rendered whole and tokenised whole, as TRL does. A token is supervised if it starts in an answer: in
what the template marks with {% generation %}, else in what its rendering adds to that of the turns before it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from support.family_templates import CONTROL_TOKENS

START, END = "\ue000", "\ue001"  # in place of the generation marks
BOS, EOS = "<s>", "<|im_end|>"
SPECIAL = ["<unk>", BOS, EOS, "<|im_start|>", "<|tool|>", *CONTROL_TOKENS]
CORPUS = [
    "user assistant system tool\n", "Hello. How are you? I am fine, thanks.\n\n", "What is 2 + 2? It is 4.\n",
    "Once upon a time there was a tokenizer. The end.\n", "### Instruction: Below is an instruction Response:\n\n",
    "User: Assistant: System: Question: Answer:\n", '{"name": "add", "arguments": {"a": 1, "b": 2}}\n',
] * 20  # fmt: skip

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
MARKED = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{%- else %}{{ m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
LLAMA2 = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{%- else %}{{ raise_exception('only user and assistant, not ' + m.role) }}{%- endif %}{%- endfor %}"
)
THINKING = (  # an empty thought before the last answer only, as Qwen3's template writes it
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{{ m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
TOOLS = (
    "{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}{{ '<|tool|>' + m.content + '<|im_end|>\n' }}{%- else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{%- for call in m.tool_calls or [] %}"
    "{{ call.function.name + ': ' + call.function.arguments | tojson }}{%- endfor %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


def user(text: Any = "Hi") -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: Any = "Yo", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def write_zoo_tokenizer(folder: Path, *, template: str | None = None, bos: bool = False) -> Path:
    """A byte-level BPE with merges, control tokens and a template; with `bos` it puts <s> in front by itself."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Sample:
    """ids, and for each whether it is a label (the first never is)."""

    ids: list[int]
    learned: list[bool]


class ZooOracle:
    """Expected samples with the tokenizer of a folder."""

    def __init__(self, folder: Path, *, template: str | None = None, bos: bool = False) -> None:
        self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.template, self.start = template or "", [SPECIAL.index(BOS)] if bos else []

    def ids(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def plain(self, prompt: str, completion: str) -> Sample:
        """A prompt and its answer, tokenised apart, with EOS."""
        before, after = [*self.start, *self.ids(prompt)], [*self.ids(completion), SPECIAL.index(EOS)]
        return _sample([*before, *after], [*(False for _ in before), *(True for _ in after)])

    def text(self, text: str) -> Sample:
        """A text without a prompt, with EOS."""
        ids = self.ids(text)
        learned = [*(False for _ in self.start), *(True for _ in ids), True]
        return _sample([*self.start, *ids, SPECIAL.index(EOS)], learned)

    def chat(
        self, messages: Sequence[dict[str, Any]], *, learned: Sequence[int] | None = None, tools: Any = None
    ) -> Sample:
        """A conversation, of which the answers with the indices `learned` (default: all) are supervised."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        places = self.places(messages, answers, tools)
        learned = answers if learned is None else learned
        chosen = [place for index, place in zip(answers, places, strict=True) if index in learned]
        encoded = self.backend.encode(self.whole(messages, tools), add_special_tokens=False)
        starts = [start for start, _ in encoded.offsets]
        return _sample(list(encoded.ids), [any(a <= start < b for a, b in chosen) for start in starts])

    def whole(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> str:
        return self.render(messages, tools).replace(START, "").replace(END, "")

    def places(
        self, messages: Sequence[dict[str, Any]], answers: Sequence[int], tools: Any = None
    ) -> list[tuple[int, int]]:
        """(start, end) of each answer in the whole text."""
        marked = self.render(messages, tools)
        if START in marked:
            edges = [place for place, letter in enumerate(marked) if letter in (START, END)]
            unmarked = [place - number for number, place in enumerate(edges)]  # each mark before it is one letter
            return list(zip(unmarked[::2], unmarked[1::2], strict=True))
        return [
            (len(self.render(messages[:index], tools, starts=True)), len(self.render(messages[: index + 1], tools)))
            for index in answers
        ]

    def render(self, messages: Sequence[dict[str, Any]], tools: Any = None, *, starts: bool = False) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)

        def fail(message: str) -> None:
            raise ValueError(message)

        environment.globals["raise_exception"] = fail
        source = self.template.replace("{% generation %}", START).replace("{% endgeneration %}", END)
        return environment.from_string(source).render(
            messages=messages, tools=tools, add_generation_prompt=starts, bos_token=BOS, eos_token=EOS
        )

    def lines(self, messages: Sequence[dict[str, Any]]) -> Sample:
        """A conversation without a template: a line for each turn, and EOS after each answer."""
        ids, learned, text = list(self.start), [False for _ in self.start], ""
        for number, message in enumerate(messages):
            text += ("\n" if number else "") + message["role"].capitalize() + ":"
            if message["role"] != "assistant":
                text += f" {message['content']}"
                continue
            before, after = self.ids(text), [*self.ids(f" {message['content']}"), SPECIAL.index(EOS)]
            ids += [*before, *after]
            learned += [*(False for _ in before), *(True for _ in after)]
            text = ""
        return _sample(ids, learned)


def _sample(ids: list[int], learned: list[bool]) -> Sample:
    return Sample(ids, [False, *learned[1:]])
