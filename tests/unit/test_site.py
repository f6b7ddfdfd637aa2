"""The site of docs/ builds without a broken link, has all flags and the Python interface; the picture is its script's;
and the notebook runs."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support.folders import ROOT, python
from support.run_helpers import write_base

import megatron_tiedlora
from megatron_tiedlora.commands.front import COMMANDS

DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", ["tie", "slots"])
def test_a_picture_is_what_its_script_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change: python docs/draw_tie.py, or draw_slots.py, which draws bytes by the server's own function."""
    monkeypatch.syspath_prepend(str(DOCS))
    assert import_module(f"draw_{name}").picture() == (DOCS / f"{name}.svg").read_text()
    first_screen = (ROOT / "README.md").read_text().splitlines()[:12]
    assert any(line.startswith("![") and line.endswith("](docs/tie.svg)") for line in first_screen)


# The site -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra docs, which the extra test brings, is not installed")
    folder = tmp_path_factory.mktemp("site")
    assert not build(ROOT / "mkdocs.yml", folder)
    return folder


def build(config: Path, folder: Path) -> list[str]:
    """Build the site; returns its warnings, of which each makes the build fail."""
    around = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": ":".join(sys.path)}
    done = python("-m", "mkdocs", "build", "-f", config, "-d", folder, **around)
    warnings = [line.partition("-")[2] for line in done.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    assert (done.returncode == 0) == (not warnings), done
    return warnings


def test_pages_of_the_code(site: Path) -> None:
    flags = (site / "flags.html").read_text()
    for command in COMMANDS:
        assert f'<h2 id="tiedlora-{command.name}">' in flags, command.name
    assert "<code>--tensor_parallel</code>" in flags and "<code>{bf16,fp16,fp32}</code>" in flags
    assert "<td><code>N</code></td><td>2000; demo 20</td>" in flags, "the default of --max_steps"
    interface = (site / "python.html").read_text()
    for name in megatron_tiedlora.__all__:
        assert f'id="megatron_tiedlora.{name}"' in interface, name
    assert "the folder has no adapter in this package" in interface and "or its files are damaged." in interface


def test_links_to_what_is_outside_of_the_documents(site: Path) -> None:
    assert 'src="tie.svg"' in (site / "index.html").read_text()
    assert 'href="../clusters.html"' in (site / "launch" / "index.html").read_text()
    assert 'href="index.html#limits"' in (site / "guide.html").read_text()
    source = "megatron_tiedlora/config/settings.py"
    assert f'href="{source}"' in (site / "extending.html").read_text()
    assert (site / source).read_bytes() == (ROOT / source).read_bytes()


def test_a_broken_link_is_an_error(site: Path, tmp_path: Path) -> None:
    """In a site of two pages, with the real one's settings. Quick: it has no pages of the code."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[a](nowhere.md) [b](api.md#nowhere) [c](../nowhere.py)\n")
    (tmp_path / "docs" / "api.md").write_text("# Two\n")
    settings = re.sub(r"(?ms)^(nav|hooks|watch|exclude_docs):.*?(?=^\w|\Z)", "", (ROOT / "mkdocs.yml").read_text())
    (tmp_path / "mkdocs.yml").write_text(settings)
    found = "\n".join(build(tmp_path / "mkdocs.yml", tmp_path / "site"))
    for name in ("'nowhere.md', but the target", "'../nowhere.py', but the target", "contain an anchor '#nowhere'"):
        assert name in found, found


# The notebook -------------------------------------------------------------------------------------------------------

SETTINGS = """
settings = Settings(
    model="model", train_file="train.jsonl", validation_file="validation.jsonl", dtype="fp32", rank=3, max_length=96,
    global_batch_size=4, max_steps=3, warmup_steps=1, eval_interval=3, learning_rate=0.05,
)
prompt = "abc?"
"""


@pytest.mark.cpu_seconds(25, reason="a run in a process of its own, as a notebook has")
@pytest.mark.distributed
def test_the_notebook_runs_on_a_tiny_model(tmp_path: Path) -> None:
    """Its cells as one program. Only the cell of parameters differs, and what IPython alone knows is left out."""
    write_base(tmp_path)
    cells = [cell for cell in json.loads((DOCS / "demo.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "it is committed without outputs"
    tagged = ["parameters" in cell["metadata"].get("tags", ()) for cell in cells]
    assert sum(tagged) == 1
    texts = [SETTINGS if own else "".join(cell["source"]) for own, cell in zip(tagged, cells, strict=True)]
    program = re.sub(r"(?m)^%.*$", "", "\n".join(texts)) + "\nplt.savefig('figure.png')\nassert len(rows) == 5, rows\n"
    (tmp_path / "notebook.py").write_text(program)
    done = python("notebook.py", folder=tmp_path, HF_HUB_OFFLINE="1", MPLBACKEND="Agg", DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert "max_steps at step 3: " in said and (tmp_path / "figure.png").is_file()
    answer, merged = said.partition("with the adapter:")[2].split("merged:")
    assert answer.strip() == merged.strip() != said.partition("base:")[2].partition("with the adapter:")[0].strip()
