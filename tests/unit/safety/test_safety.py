"""What is never done: running code out of files, listening, writing for others, reaching into objects by a template."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.folders import ROOT, python
from support.task_files import HUB_ROWS, refusal, write_rows

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.output_folder import make_own_folder, make_private_folder
from megatron_tiedlora.config.cli import keep_from_others
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Reading

FILES = sorted(file for folder in ("megatron_tiedlora", "launch", "tools") for file in (ROOT / folder).rglob("*.py"))

# Modules that make objects out of bytes, or serve anyone who connects.
REFUSED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "runpy",
                   "socketserver", "http.server", "xmlrpc", "asyncio", "flask", "fastapi", "aiohttp", "uvicorn",
                   "starlette"}  # fmt: skip
# The first runs a function in a thread, for a server that has a loop already. The second is the training service, which
# listens where its user says, and checks keys and sizes (tests/service).
IMPORTERS = {
    *(("megatron_tiedlora/integrations/vllm/resolver.py", name) for name in ("asyncio", "starlette")),
    *(("megatron_tiedlora/service/http.py", name) for name in ("asyncio", "uvicorn", "starlette")),
}
# Calls, by the end of their dotted name.
REFUSED_CALLS = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
                 "pandas.read_pickle", "read_pickle", "os.system", "listen"}  # fmt: skip
# torch sends objects pickled: whoever joins as a rank would run code on the others. Values travel as JSON.
SENDS_OBJECTS = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "rpc",
                 "send_object_list", "recv_object_list", "_object_to_tensor", "_tensor_to_object"}  # fmt: skip
# Probes of a port, which never listen and are closed at once.
BINDERS = {("megatron_tiedlora/runtime/launch_env.py", "free_port"), ("megatron_tiedlora/service/http.py", "take_port")}


def calls(file: Path) -> Iterator[tuple[str, ast.Call, str]]:
    """Every call of a file: its dotted name, itself, and the function that it stands in."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call, str]]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            if isinstance(child, ast.Call):
                yield ast.unparse(child.func), child, inner
            yield from walk(child, inner)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), "")


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def names_in(file: Path) -> set[str]:
    """Every name that a file imports or uses, called or not."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found.update(part for name in names for part in name.split("."))
        elif isinstance(node, ast.Attribute | ast.Name):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def test_objects_that_are_sent_are_found(tmp_path: Path) -> None:
    for line in ("from torch.distributed import gather_object as g", "x = partial(distributed.all_gather_object, y)",
                 "import torch.distributed.rpc", "send = broadcast_object_list"):  # fmt: skip
        (tmp_path / "file.py").write_text(line)
        assert names_in(tmp_path / "file.py") & SENDS_OBJECTS, line


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_code_out_of_files_no_listener_and_no_objects_between_ranks(file: Path) -> None:
    place = str(file.relative_to(ROOT))
    assert not names_in(file) & SENDS_OBJECTS, place
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            parts = {name, name.split(".")[0]}
            refused = {(place, part) for part in parts & REFUSED_MODULES}
            assert refused <= IMPORTERS, f"{place} imports {name}"
    for name, call, function in calls(file):
        last = name.split(".")[-1]
        where = f"{place}:{call.lineno} calls {name}"
        assert name not in REFUSED_CALLS and last not in REFUSED_CALLS - {"eval", "compile"}, where
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", where
        for word in ("trust_remote_code", "allow_pickle", "shell"):
            assert keyword(call, word) in (None, "False"), where
        if last == "from_pretrained" and ".Auto" in f".{name}":  # else it may ask whether to run the folder's code
            assert keyword(call, "trust_remote_code") == "False", where
        if last in ("bind", "create_server"):
            assert (place, function) in BINDERS, where


# Templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [
    "{question.__class__}", "{question[0]}", "{question!r}", "{question:>{answer}}", "{0}", "{}", "{__class__}",
    "{a b}", "{question:1000000000}", "{question", "}", "{question.__init__.__globals__}", "\ud800{question}",
])  # fmt: skip
def test_a_template_reaches_nothing_but_fields(tmp_path: Path, template: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [HUB_ROWS["gsm8k"]])
    files = {"test": file}
    message = refusal(lambda: load_split("gsm8k", "test", files=files, seed=0, reading=Reading(template=template)))
    assert message.startswith("--prompt_template")
    reasons = ("is not a plain {field} name", "write {field}", "surrogate", "no field '__class__'")
    assert any(reason in message for reason in reasons), message


def test_a_field_that_is_not_text_is_refused_in_a_template_too(tmp_path: Path) -> None:
    """A task checks the fields that it reads itself; a template may name any other."""
    file = write_rows(tmp_path / "rows.jsonl", [{**HUB_ROWS["gsm8k"], "note": "\ud800"}])
    reading = Reading(template="{note}")
    message = refusal(load_split, "gsm8k", "test", files={"test": file}, seed=0, reading=reading)
    assert f"{file}:1: field 'note' has an invalid character (an unpaired surrogate)" in message


def test_a_row_s_own_braces_stay_text(tmp_path: Path) -> None:
    row = {"question": "{answer.__class__} {0} {{", "answer": "#### 1"}
    file = write_rows(tmp_path / "rows.jsonl", [row])
    for template in (None, "{question}"):
        (example,) = load_split("gsm8k", "test", files={"test": file}, seed=0, reading=Reading(template=template))
        assert row["question"] in example.prompt
    rows = [{"instruction": "{input.__class__}", "input": "{0}", "output": "x"}]
    (example,) = load_split("custom", "test", files={"test": write_rows(tmp_path / "a.jsonl", rows)}, seed=0)
    assert "{input.__class__}" in example.prompt and "{0}" in example.prompt


# Messages ---------------------------------------------------------------------------------------------------------


def test_a_message_is_one_short_line_whatever_is_in_it() -> None:
    said = str(UserError("a\nb\x1b[2J\ud800\u2028" + "x" * 10**7 + "; the fix"))
    assert said.isprintable() and said.startswith("a\\nb\\x1b[2J\\ud800") and said.endswith("; the fix")
    assert len(said) < 1300 and str(UserError(said)) == said
    assert str(UserError("file: a plain line, é 日本")) == "file: a plain line, é 日本"


def test_values_are_shown_short() -> None:
    knot: list[object] = []
    knot.append(knot)
    wide: object = 0
    for _ in range(60):
        wide = [wide] * 9  # as aliases of YAML make it: 9 to the 60th numbers
    for value in (knot, wide, 1 << 100_000, "x" * 10**6, {"a": wide}, {1: wide}, b"x" * 10**6):
        assert len(shown(value)) < 3000
    assert (shown(3), shown(True), shown(None), shown("a"), shown([1, 2])) == ("3", "True", "None", "'a'", "[1, 2]")


# Permissions ------------------------------------------------------------------------------------------------------


def test_nothing_that_a_command_makes_can_be_written_by_others(tmp_path: Path) -> None:
    """Whatever the user's umask; children inherit it."""
    script = """
import os, subprocess; from pathlib import Path; os.umask(0)
from megatron_tiedlora.config.cli import run_command
from megatron_tiedlora.base.files import new_folder, write_text
def main(argv):
    with new_folder(Path('made')) as folder: (folder / 'file').write_text('x')
    write_text(Path('text'), 'x'); Path('plain').write_text('x'); Path('a/b').mkdir(parents=True)
    return subprocess.run(['sh', '-c', 'mkdir child; echo x > child/file']).returncode
run_command(main, [])
"""
    assert python("-c", script, folder=tmp_path).returncode == 0
    made = list(tmp_path.rglob("*"))
    assert {path.name for path in made} == {"made", "file", "text", "plain", "a", "b", "child"}
    assert not any(path.is_symlink() or path.stat().st_mode & stat.S_IWOTH for path in made)


@pytest.mark.parametrize(("before", "after"), [(0o000, 0o002), (0o022, 0o022), (0o077, 0o077), (0o007, 0o007)])
def test_the_umask_only_gets_stricter(before: int, after: int) -> None:
    kept = os.umask(before)
    try:
        keep_from_others()
        assert os.umask(0) == after
    finally:
        os.umask(kept)


def test_a_cache_that_anyone_may_fill_is_refused(tmp_path: Path) -> None:
    """That of a group is left as it is: its owner has let the group in, for a team's cache."""
    cache = tmp_path / "new" / "cache"
    make_own_folder(cache)
    make_own_folder(cache)  # it is there
    cache.chmod(0o2770)
    make_own_folder(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o2770
    cache.chmod(0o777)
    assert "new/cache: is writable by anyone" in refusal(make_own_folder, cache)


def test_a_folder_in_a_shared_place_is_this_user_s_own(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "mine")
    make_private_folder(tmp_path / "mine")
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    taken = ["link", "open"]
    if os.getuid() == 0:
        (tmp_path / "theirs").mkdir(mode=0o700)
        os.chown(tmp_path / "theirs", 65534, 65534)
        taken.append("theirs")
    for name in taken:
        assert "is not a private folder of this user" in refusal(make_private_folder, tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make_private_folder(tmp_path / "file")
