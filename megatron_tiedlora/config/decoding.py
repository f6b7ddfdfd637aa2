"""Limits on the lengths of answers and of the prompts before them."""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError


def resolve_max_new_tokens(value: int | None, longest: int, default: int) -> int:
    """The maximum number of tokens to generate for one answer.

    Args:
        value: of --max_new_tokens. None: `default`, but at most half of the longest row.
        longest: the most tokens of a row, prompt and answer together.
        default: the task's.

    Raises:
        UserError: the value leaves no room for a prompt.
    """
    if value is None:
        return max(min(default, longest // 2), 1)
    if value >= longest:
        raise UserError(
            f"--max_new_tokens {value} leaves no room for a prompt in rows of at most {longest} tokens; give fewer"
        )
    return value


def longest_prompt(max_length: int | None, longest: int, max_new_tokens: int) -> int:
    """The maximum prompt length for generation: as in training, but leaving `max_new_tokens` positions for the answer.

    Args:
        max_length: of --max_length; None: the longest row.
    """
    return min(max_length or longest, longest - max_new_tokens)
