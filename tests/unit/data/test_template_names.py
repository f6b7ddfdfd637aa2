"""Which names a chat template reads: those of its syntax, not words in comments, texts or other names."""

from __future__ import annotations

import pytest
from zoo_oracle import MARKED, TOOLS

from megatron_tiedlora.data.chat_template import template_names


@pytest.mark.parametrize(
    ("text", "variables", "fields", "constants"),
    [
        ("{% if tools %}{{ tools | tojson }}{% endif %}", {"tools"}, set(), set()),
        ("{# tools #}tools {{ 'tools' }}{% set tools = 1 %}{{ f(tools=1) }}", {"f"}, set(), set()),
        ("{% raw %}{{ tools }}{% endraw %}{{ builtin_tools }}", {"builtin_tools"}, set(), set()),
        ("{{ m.tool_calls }}", {"m"}, {"tool_calls"}, set()),
        ("{{ m['tool_calls'] }}", {"m"}, {"tool_calls"}, {"tool_calls"}),
        ("{% if 'thinking' in m %}{% endif %}", {"m"}, {"thinking"}, {"thinking"}),
        ("{{ m.get('thinking') }}", {"m"}, {"get", "thinking"}, {"thinking"}),
        ("{% if m.role in ['tool', 'ipython'] %}{% endif %}", {"m"}, {"role", "tool", "ipython"}, {"tool", "ipython"}),
        ("{{ {'tool': 'x'}[m.role] + 'critic' }}{{ 'a' ~ 'b' }}", {"m"}, {"role", "tool", "x"}, {"tool", "x"}),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}", {"messages", "loop"},
         {"first"}, set()),
        ("{%- macro f(tools) -%}{% generation %}{{ tools }}{% endgeneration %}{%- endmacro -%}", {"tools"}, set(),
         set()),
    ],
)  # fmt: skip
def test_names_are_those_of_the_syntax(text: str, variables: set[str], fields: set[str], constants: set[str]) -> None:
    found = template_names(text)
    assert (found.variables, found.fields, found.constants) == (variables, fields, constants)


def test_whole_templates() -> None:
    assert "tools" in template_names(TOOLS).variables and "tool_calls" in template_names(TOOLS).fields
    assert template_names(TOOLS).constants == {"tool"}
    assert template_names(MARKED).constants == {"assistant"}
