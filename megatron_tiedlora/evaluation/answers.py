"""A model's answer to one example, as text and as log-likelihoods: the unit that every metric scores."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.examples import Example


@dataclass(frozen=True)
class Answer:
    """One answered example.

    Attributes:
        prediction: the generated text, without the prompt, cut at the task's stop text.
        choice_scores: log-likelihood in nats of each of `example.choices` after the prompt, summed over its tokens;
            empty if none were computed.
    """

    prediction: str
    example: Example
    choice_scores: tuple[float, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """The texts that the prediction is scored against: the example's references that are not blank.

        Raises:
            UserError: the example has none.
        """
        found = tuple(text for text in self.example.references if text.strip())
        if not found:
            raise UserError(f"{self.example.source}: no reference to score against; give the row an answer")
        return found
