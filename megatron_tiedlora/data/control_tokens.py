"""Control tokens in a row's own text, where they could end a turn or start another.

`guard` rejects them, or marks them so that `pieces` can cut them out of the finished text to be tokenised as plain
text. The control tokens that a template writes stay what they are. Owns nothing but this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.examples import Segment

_START, _END = "\ufdd0", "\ufdd1"  # code points that are no characters, for a program's own use


class ControlTokens:
    """The control tokens of a tokenizer, and what they mean in a row's text.

    Args:
        tokenizer: None if it is unknown, as for a text that is not tokenised.
        meaning: value of --special_tokens_in_text.
    """

    def __init__(self, tokenizer: Any, meaning: str) -> None:
        self.meaning = meaning
        self._find: re.Pattern[str] | None = None
        if tokenizer is None or meaning == "control" or getattr(tokenizer, "split_special_tokens", False):
            return
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        found = {str(token) for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", ()))
        if found := {token for token in found if token.strip()}:
            longest_first = sorted(found, key=len, reverse=True)
            self._find = re.compile("|".join(map(re.escape, longest_first)))

    def guard(self, value: Any, what: str, source: str) -> Any:
        """`value` (a text, or JSON with texts) of a row, with its control tokens marked. `what` names it in messages.

        Raises:
            UserError: there is one, and it is to be rejected.
        """
        if isinstance(value, str):
            return self._guarded(value, what, source)
        if isinstance(value, dict):
            return {self.guard(key, what, source): self.guard(item, what, source) for key, item in value.items()}
        return [self.guard(item, what, source) for item in value] if isinstance(value, list | tuple) else value

    def _guarded(self, text: str, what: str, source: str) -> str:
        if self.meaning == "plain" and (_START in text or _END in text):
            raise UserError(f"{source}: {what} holds U+FDD0 or U+FDD1, which are no characters; remove them")
        found = None if self._find is None else self._find.search(text)
        if self._find is None or found is None:
            return text
        if self.meaning == "plain":
            return self._find.sub(f"{_START}\\g<0>{_END}", text)
        raise UserError(
            f"{source}: {what} holds {found[0]!r}, a control token of the tokenizer; give"
            " --special_tokens_in_text plain to read it as text, or control to read it as that token"
        )

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """The text without marks, as pieces and whether each is a control token that is plain text."""
        if self.meaning != "plain" or (_START not in text and _END not in text):
            return [(text, False)]
        pieces = []
        for start in text.split(_START):
            marked, end, after = start.partition(_END)
            pieces += [(marked, bool(end)), (after, False)] if end else [(start, False)]
        return [(piece.replace(_END, ""), plain) for piece, plain in pieces if piece] or [("", False)]


def marked(segments: Iterable[Segment]) -> str:
    """The text of segments, with marks at those that are plain."""
    return "".join(f"{_START}{segment.text}{_END}" if segment.plain else segment.text for segment in segments)


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.replace(_START, "").replace(_END, "")
