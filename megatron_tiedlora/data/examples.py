"""The unit every task produces: one prompt with the text that has to follow it.

Owns the `Example` record and the one rule by which an answer is joined to its prompt. Leaves reading rows
to `readers`, building prompts to `tasks` and `splits`, and tokens to `encode`.

The full text of a sample is prompt + completion: the completion carries its own leading space.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One sample as text.

    prompt: what the model is given, without a trailing space.
    completion: what it has to continue with, leading space included, end-of-sequence token not included.
    source: where it was read, for messages ("train.jsonl:12").
    references: texts a prediction is scored against, stripped; the stripped completion when none are given.
    choices: the texts, stripped, of which the answer is one, references[0]; empty where there is no choice.
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
    """Return the completion that follows `prompt`: the answer behind one space.

    The only place that knows the convention. No space is added where the answer brings its own white space,
    where the prompt ends with some (a chat template's generation prompt does), or where there is no prompt.
    """
    if not prompt or prompt[-1].isspace() or answer[:1].isspace():
        return answer
    return " " + answer
