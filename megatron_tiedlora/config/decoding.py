"""Limits on the lengths of answers and of the prompts before them."""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError


def resolve_max_new_tokens(value: int | None, max_positions: int, default: int) -> int:
    """The maximum number of tokens to generate for one answer.

    Args:
        value: of --max_new_tokens. None: `default`, but at most half of the model's positions.
        max_positions: positions of the model, for prompt and answer together.
        default: the task's.

    Raises:
        UserError: the value leaves no position for a prompt.
    """
    if value is None:
        return max(min(default, max_positions // 2), 1)
    if value >= max_positions:
        raise UserError(
            f"--max_new_tokens {value} leaves no room for a prompt in the model's {max_positions} positions; give fewer"
        )
    return value


def longest_prompt(max_length: int | None, max_positions: int, max_new_tokens: int) -> int:
    """The maximum prompt length for generation: as in training, but leaving `max_new_tokens` positions for the answer.

    Args:
        max_length: of --max_length; None: the model's positions.
    """
    return min(max_length or max_positions, max_positions - max_new_tokens)
