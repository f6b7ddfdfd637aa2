"""How much is decoded by default: how many samples of the demo, and how long an answer may become."""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError

# What the demo decodes unless told otherwise: enough to see a change, short enough for two CPU cores.
DEMO_SCORED_SAMPLES = 24
DEFAULT_NEW_TOKENS = 500
DEMO_NEW_TOKENS = 200  # of the demo's worked answers, 99 % are shorter


def resolve_max_new_tokens(value: int | None, max_positions: int, task: str) -> int:
    """The most tokens that are decoded for one answer.

    Args:
        value: of --max_new_tokens; None for 500 (the demo: 200), or half of a context that is shorter than twice that.
        max_positions: that the model was made for, prompt and answer together.

    Raises:
        UserError: a value that leaves no position to a prompt.
    """
    if value is None:
        return max(min(DEMO_NEW_TOKENS if task == "demo" else DEFAULT_NEW_TOKENS, max_positions // 2), 1)
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
