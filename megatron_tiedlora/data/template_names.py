"""Which names a chat template reads, by the syntax tree of Jinja: a comment, or a part of another word, is no name.

It parses a stranger's file, so it runs in the process of `chat_template`, which limits it.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser


@dataclass(frozen=True)
class TemplateNames:
    """The names in a template.

    variables: names that it reads, such as tools in `{% if tools %}`.
    fields: what it reads of an object, as message.tool_calls or message['tool_calls'], and all `constants`.
    constants: texts in its code, such as those that it compares roles with; without those that it only writes.
    """

    variables: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()


class _Generation(Extension):
    """Parses {% generation %}, the mark around what the assistant generates."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes inside of it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_names(text: str) -> TemplateNames:
    """The names in a template's text. Raises whatever Jinja does for a broken one."""
    tree = Environment(autoescape=False, extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(text)
    writers = tree.find_all((nodes.Output, nodes.Add, nodes.Concat))
    written = {id(child) for node in writers for child in node.iter_child_nodes()}
    constants = frozenset(
        node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str) and id(node) not in written
    )
    return TemplateNames(
        frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"),
        frozenset(node.attr for node in tree.find_all(nodes.Getattr)) | constants,
        constants,
    )
