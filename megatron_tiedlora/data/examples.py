"""The unit that every task produces: a prompt with the text that follows it.

Owns the `Example` record and the one rule that joins an answer to its prompt. Leaves reading rows to `readers`,
building prompts to `tasks` and `splits`, and tokens to `encode`.

The full text of a sample is prompt + completion: the completion carries its own leading space.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One sample as text.

    prompt: the model's input, without a trailing space.
    completion: the expected continuation, with its leading space and without the end-of-sequence token.
    source: where it was read, for messages ("train.jsonl:12").
    references: stripped texts that a prediction is scored against; by default the stripped completion.
    choices: stripped texts of a multiple-choice question, including the answer, references[0]; else empty.
    """

    prompt: str
    completion: str
    source: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.references:
            object.__setattr__(self, "references", (self.completion.strip(),))


def join_answer(prompt: str, answer: str) -> str:
    """Return the completion that follows `prompt`: the answer after one space.

    Only this function knows the convention. It adds no space if the answer starts with white space, if the prompt
    ends with it (a chat template's generation prompt does), or if the prompt is empty.
    """
    if not prompt or prompt[-1].isspace() or answer[:1].isspace():
        return answer
    return " " + answer
