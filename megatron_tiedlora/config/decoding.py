"""Defaults for generation: how many demo samples are scored, and how long an answer may become."""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError

# Demo rows that are scored by default: enough to see a change, few enough for two CPU cores.
DEMO_SCORED_SAMPLES = 24
DEFAULT_NEW_TOKENS = 500
DEMO_NEW_TOKENS = 200  # 99 % of the demo's worked answers are shorter


def resolve_max_new_tokens(value: int | None, max_positions: int, task: str) -> int:
    """The maximum number of tokens to generate for one answer.

    Args:
        value: of --max_new_tokens. None: 500 (the demo: 200), but at most half of the model's positions.
        max_positions: positions of the model, for prompt and answer together.

    Raises:
        UserError: the value leaves no position for a prompt.
    """
    if value is None:
        return max(min(DEMO_NEW_TOKENS if task == "demo" else DEFAULT_NEW_TOKENS, max_positions // 2), 1)
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
