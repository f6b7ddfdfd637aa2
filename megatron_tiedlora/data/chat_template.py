"""Conversations made prompts by the tokenizer's chat template, which is a program out of a stranger's model folder.

transformers runs it in Jinja's sandbox, which lets it reach no files and no objects, but lets it take time and memory
without end. So each conversation has a limit of both, and of what it may become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.data.limits import limited

# Templates take milliseconds (the first, which loads Jinja, some tenths of a second) and a few times the text; they add
# some kB of their own to it.
_SECONDS, _MEMORY = 1.0, 2**28
_OWN_CHARACTERS, _RATIO = 100_000, 10


def render_turns(turns: Sequence[Mapping[str, str]], source: str, tokenizer: Any) -> str:
    """The prompt of a conversation whose next turn is the assistant's, from a tokenizer that has a chat template.

    Raises:
        UserError: the template refuses the turns or fails; it takes more than a second of a processor or 256 MiB; its
            text is longer than 100,000 characters and ten times the conversation's.
    """
    longest = _OWN_CHARACTERS + _RATIO * sum(len(text) for turn in turns for text in turn.values())
    try:
        with limited(memory=_MEMORY, seconds=_SECONDS):
            text = str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))
        if len(text) <= longest:
            return text
        reason = f"makes {len(text):,} characters of these messages, where {longest:,} are the most"
    except TimeoutError:
        reason = f"takes more than {_SECONDS:g} s for these messages"
    except MemoryError:
        reason = f"needs more than {_MEMORY:,} bytes for these messages"
    except Exception as error:  # a template is a program: it may refuse roles, or fail in any other way
        reason = f"refuses these messages ({error})"
    # Raised here, since an exception keeps what it was raised from, and with it all that the template has made.
    place = getattr(tokenizer, "name_or_path", "the tokenizer")
    raise UserError(f"{source}: the chat template of {place} {reason}; give other rows or another --tokenizer")
