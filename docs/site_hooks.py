"""Add pages and files to the MkDocs site: pages made from the code, and files outside docs/ that pages link to.

Each build makes `flags.md` from the settings, `python.md` from the Python interface and `demo.md` from the notebook.
Links in documents are relative to the repository. The files in `PAGES` become pages, and other linked files are copied.
"""

import importlib
import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import megatron_tiedlora
from megatron_tiedlora.commands.front import COMMANDS
from megatron_tiedlora.config.cli import build_parser
from megatron_tiedlora.config.fields import CommandSettings, declared, flag_word
from megatron_tiedlora.config.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "launch/README.md")  # pages from outside docs/
NOTEBOOK = "demo.ipynb"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, the pages outside docs/, and the files that pages link to. Return all files."""
    for name, text in (("flags.md", flags_page()), ("python.md", python_page()), ("demo.md", notebook_page())):
        files.append(File.generated(config, name, content=text))
    for name in (*PAGES, *linked_files()):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert repository links in a page to links of the site, where docs/ is the root folder. Return the page."""
    if page.file.src_uri in PAGES:
        markdown = re.sub(r"(\]\((?:\.\./)*)docs/", r"\1", markdown)
    elif page.file.src_uri != "demo.md":
        markdown = markdown.replace("](../", "](")
    return markdown if page.file.src_uri == "demo.md" else markdown.replace(f"]({NOTEBOOK})", "](demo.md)")


def linked_files() -> list[str]:
    """Return the files outside docs/ that documents in docs/ link to, except for pages."""
    texts = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))]
    names = {name for text in texts for name in re.findall(r"\]\(\.\./([^)#]+)", text)}
    return sorted(name for name in names if name not in PAGES and (ROOT / name).is_file())


def flags_page() -> str:
    """Return the text of the page with the flags of every command."""
    lines = [
        "# Flags",
        "",
        "`tiedlora COMMAND --help` prints the same text. A command whose flags are in groups also has `--config FILE`."
        " FILE is a YAML file with settings under the same names.",
    ]
    for command in COMMANDS:
        kind = settings_of(command.name, command.settings.partition(":")[0])
        lines += ["", f"## tiedlora {command.name}", "", f"{command.about[0].upper()}{command.about[1:]}."]
        for group in kind.groups or {"": ""}:
            lines += ["", f"**{group.capitalize()}**: {kind.groups[group]}", ""] if group else [""]
            lines += flags_table(kind, group)
    return "\n".join(lines) + "\n"


def settings_of(command: str, module: str) -> type[CommandSettings]:
    """Return the settings class of `command`. The class is defined in `module` of megatron_tiedlora.config."""
    found = vars(importlib.import_module(f"megatron_tiedlora.config.{module}")).values()
    kinds = [one for one in found if isinstance(one, type) and issubclass(one, CommandSettings)]
    return [kind for kind in kinds if getattr(kind, "prog", "") == f"tiedlora {command}"][-1]


def flags_table(kind: type[CommandSettings], group: str) -> Iterator[str]:
    """Yield the HTML table of a group of flags. Markdown would not work, since values contain `|`."""
    values = {action.dest: action.metavar for action in build_parser(kind)._actions}
    yield "<table><thead><tr><th>flag</th><th>value</th><th>default</th><th>meaning</th></tr></thead><tbody>"
    for name, own in declared(kind).items():
        if own.group != group:
            continue
        field = kind.model_fields[name]
        hint = kind.missing.get(name, "")
        needed = field.is_required() and not hint and kind is not Settings  # Settings fills in the defaults of the task
        default = "required" if needed else kind.default_text(name)
        flag = flag_word(name, kind)
        value = values.get(name, values.get(flag)) or ""
        cells = (f"<code>{escape(flag)}</code>", f"<code>{escape(str(value))}</code>", escape(default))
        meaning = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(f"{field.description}{hint and f' ({hint})'}"))
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in (*cells, meaning))}</tr>"
    yield "</tbody></table>"


def python_page() -> str:
    """Return the text of the Python reference. mkdocstrings inserts signatures and docstrings into the page."""
    names = [f"megatron_tiedlora.{name}" for name in megatron_tiedlora.__all__ if name != "Settings"]
    lines = [
        "# Python reference",
        "",
        "See [Python interface](api.md) for examples. The fields of `Settings` are the [flags of `tiedlora"
        " train`](flags.md#tiedlora-train). [PEFT](peft.md#train) describes the fields of `TiedLoraConfig`.",
        "",
        "::: megatron_tiedlora.Settings",
        "    options: {members: false}",
        *(f"\n::: {name}" for name in names),
        "\n::: megatron_tiedlora.peft\n    options: {members: false}",
        "\n::: megatron_tiedlora.peft.method.TiedLoraConfig\n    options: {members: false}",
    ]
    return "\n".join(lines) + "\n"


def notebook_page() -> str:
    """Return the cells of the notebook as a page, with a link to the notebook file."""
    cells = json.loads((ROOT / "docs" / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    marks = {"markdown": ("", ""), "code": ("```python\n", "\n```")}
    blocks = ["".join(cell["source"]).join(marks[cell["cell_type"]]) for cell in cells]
    return "\n\n".join([*blocks, f"This page is a notebook: [{NOTEBOOK}]({NOTEBOOK})."]) + "\n"
