"""The unit that every task produces: a prompt with the text that follows it.

Owns the `Example` record, the segments that its text is made of, and the one rule that joins an answer to its prompt.
Leaves reading rows to `readers`, building prompts to `tasks` and `splits`, and tokens to `encode`.

The full text of a sample is that of its segments: prompt + completion, where the completion carries its own leading
space, or the turns of a conversation.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tiedlora.data.turns import Conversation


@dataclass(frozen=True)
class Segment:
    """A piece of a sample's text that is tokenised on its own.

    supervised: whether its tokens are learned.
    plain: whether control tokens in it are read as plain text.
    ends: whether an end-of-sequence token follows, which is supervised as the text is.
    """

    text: str
    supervised: bool = False
    plain: bool = False
    ends: bool = False


@dataclass(frozen=True)
class Example:
    """One sample as text.

    prompt: the model's input, without a trailing space; '' for text without a prompt.
    completion: the expected continuation, with its leading space and without the end-of-sequence token.
    source: where it was read, for messages ("train.jsonl:12").
    references: stripped texts that a prediction is scored against; by default the stripped completion.
    choices: texts of a multiple-choice question, including the answer, references[0]; else empty.
    endings: the choices as they follow the prompt; by default each after one space.
    segments: the whole text; by default prompt and completion.
    num_prompt: number of segments before the last answer.
    conversation: the turns that the segments were made of; None if it is no chat.
    templated: whether a chat template wrote the text, which then has its own beginning and end.
    """

    prompt: str
    completion: str
    source: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()
    num_prompt: int = 1
    conversation: Conversation | None = None
    templated: bool = False

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", (self.completion.strip(),))
        if not self.segments:
            both = (Segment(self.prompt), Segment(self.completion, supervised=True, ends=True))
            object.__setattr__(self, "segments", both)

    @property
    def prompt_segments(self) -> tuple[Segment, ...]:
        """What a model sees before the last answer."""
        return self.segments[: self.num_prompt]


def join_answer(prompt: str, answer: str) -> str:
    """Return the completion that follows `prompt`: the answer after one space.

    Only this function knows the convention. It adds no space if the answer starts with white space, if the prompt
    ends with it (a chat template's generation prompt does), or if the prompt is empty.
    """
    if not prompt or prompt[-1].isspace() or answer[:1].isspace():
        return answer
    return " " + answer
