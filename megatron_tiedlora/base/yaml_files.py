"""Reads YAML files of settings: names and plain values. Every failure is a one-line UserError.

Owns which part of YAML is read: one document without tags, duplicate names, anchors or aliases. Aliases can expand to
more than a machine's memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_tiedlora.base.atomic import Guard, unguarded, write_text
from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.text_files import read_small_text
from megatron_tiedlora.base.wording import first_line

LARGEST_YAML = 2**18  # bytes; PyYAML takes seconds for a megabyte


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader that rejects anchors, aliases and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not supported", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if names and names.most_common(1)[0][1] > 1:
            problem = f"{shown(names.most_common(1)[0][0])} appears twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def write_yaml(path: Path, content: Mapping[str, Any] | list[Any], *, guard: Guard = unguarded) -> None:
    """Replace a YAML file atomically, keeping the order of names. Raises UserError naming the file."""
    plain = content if isinstance(content, list) else dict(content)
    write_text(path, yaml.safe_dump(plain, sort_keys=False), guard=guard)


def read_yaml_mapping(file: Path) -> dict[str, Any]:
    """The names and values of an existing file. The result is empty if the file is.

    Raises:
        UserError: the file is not valid; the message names it, and the line if known.
    """
    return parse_yaml_mapping(read_small_text(file, kind="YAML", largest=LARGEST_YAML), source=str(file))


def read_yaml_list(file: Path) -> list[Any]:
    """The entries of an existing file that holds a list; none if it is empty. Raises UserError naming the file."""
    content = _parse_yaml(read_small_text(file, kind="YAML", largest=LARGEST_YAML), source=str(file))
    if content is not None and not isinstance(content, list):
        raise UserError(f"{file}: expected a list, whose entries begin with '- ', found a {type(content).__name__}")
    return content or []


def parse_yaml_mapping(text: str, *, source: str) -> dict[str, Any]:
    """The names and values of a text, as `read_yaml_mapping`. Raises UserError naming the `source`."""
    content = _parse_yaml(text, source=source)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{source}: expected 'name: value' lines, found a {type(content).__name__}")
    return content


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return _PlainLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{source}{where}: not valid YAML ({problem})") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML (nested too deeply)") from None
    # PyYAML converts text that looks like a date or carries a tag, whether or not it is valid.
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{source}: holds a value that cannot be read ({error}); put text in quotes") from None
