"""How long an answer, and the prompt before it, may become."""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError


def resolve_max_new_tokens(value: int | None, max_positions: int, default: int) -> int:
    """The most tokens that are decoded for one answer.

    Args:
        value: of --max_new_tokens; None for the default, or half of a context that is shorter than twice that.
        max_positions: that the model was made for, prompt and answer together.
        default: the task's.

    Raises:
        UserError: a value that leaves no position to a prompt.
    """
    if value is None:
        return max(min(default, max_positions // 2), 1)
    if value >= max_positions:
        raise UserError(
            f"--max_new_tokens {value} leaves no room for a prompt in the model's {max_positions} positions; give fewer"
        )
    return value


def longest_prompt(max_length: int | None, max_positions: int, max_new_tokens: int) -> int:
    """Tokens of a prompt that is decoded: as many as in training, where the model's positions leave room for an answer.

    Args:
        max_length: of --max_length; None for the model's positions.
    """
    return min(max_length or max_positions, max_positions - max_new_tokens)
