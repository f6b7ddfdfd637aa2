"""A broken `adapters.sqlite`, or one that is made to harm: rows of adapters in its folder, or one line; no other file
is opened.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
from damage import NASTY, clear, damaged, odd_place
from fuzzing import MAPPED, Draw, bounded, cases, explore, outcome, printable

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, save_adapter
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.convert.index import FORMAT, INDEX_FILE

ADAPTERS = ("one", "two", "runs/three")
VALUES = ("NULL", "-1", "0", "1", "7", "1.5", "9e999", "-9e999", "9223372036854775807", "''", "'x'", "'abc'", "x'00'",
          "x'ff80'", "cast(x'c328' AS TEXT)", "char(0)", "char(27) || '[2J'", "'/etc'", "'../outside'", "'one/../..'",
          "'/proc/self/environ'", "'linked'", "'one'", "hex(zeroblob(300))", "hex(zeroblob(3000000))",
          "zeroblob(3000000)", "'[' || hex(zeroblob(50000))", "hex(zeroblob(32))", "'*'", "'tl6'")  # fmt: skip
NUMBERS = "SELECT 1 UNION ALL SELECT x + 1 FROM t"  # of t, without an end
ENDLESS = f"WITH RECURSIVE t(x) AS ({NUMBERS})"
SCHEMAS = (
    "DROP TABLE adapters",
    "ALTER TABLE adapters RENAME TO more",
    "ALTER TABLE adapters DROP COLUMN alpha",
    "ALTER TABLE adapters ADD COLUMN more AS (hex(zeroblob(3000000)))",
    "ALTER TABLE adapters RENAME COLUMN path TO run_path",
    "ALTER TABLE adapters RENAME TO t; CREATE VIEW adapters AS SELECT a.* FROM t a, t b, t c, t d, t e, t f, t g, t h",
    f"ALTER TABLE adapters RENAME TO r; CREATE VIEW adapters AS {ENDLESS} SELECT r.* FROM r, t",
    "CREATE TRIGGER t AFTER INSERT ON adapters BEGIN DELETE FROM adapters; END",
    "CREATE INDEX more ON adapters (hex(path))",
    "CREATE VIRTUAL TABLE more USING fts4(x)",
    "DROP INDEX adapters_name",
    "ANALYZE",
    "PRAGMA user_version = 0",
    "PRAGMA user_version = -2147483648",
    "PRAGMA page_size = 65536; VACUUM",
    "PRAGMA page_size = 512; VACUUM",
    "PRAGMA journal_mode = WAL",
    "DELETE FROM adapters",
)
UNLOCKED = "PRAGMA writable_schema = 1; "
SECRET_SCHEMAS = (
    "UPDATE sqlite_master SET rootpage = 1 + abs(random()) % 12 WHERE name = 'adapters'",
    "UPDATE sqlite_master SET rootpage = 2",
    "UPDATE sqlite_master SET type = 'view'",
    "UPDATE sqlite_master SET name = 'x'",
    "UPDATE sqlite_master SET sql = replace(sql, 'TEXT', 'BLOB')",
    "UPDATE sqlite_master SET sql = sql || hex(zeroblob(1000000)) WHERE name = 'adapters'",
    "UPDATE sqlite_master SET sql = cast(x'ff' || sql AS TEXT)",
    f"INSERT INTO sqlite_master {ENDLESS} SELECT 'table', 't' || x, 't' || x, 2, 'CREATE TABLE t' || x || '(a, b)' FROM"
    " t LIMIT 20000",
)
ACTIONS = (["lineage", "prod"], ["lineage", "one"], ["find", "--alias", "*", "--tag", "k*"],
           ["find"], ["find", "--json"], ["verify"], ["diff", "one", "two"], ["find", "--name", "*o*"],
           ["find", "--rank", "4", "--method", "tl?"], ["verify", "--base_model", "*"])  # fmt: skip


class Opened:
    """The files that Python opens while it watches. SQLite opens its own."""

    def __init__(self) -> None:
        self._paths: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._paths is not None and event == "open" and isinstance(arguments[0], str | bytes):
            self._paths.append(os.fsdecode(arguments[0]))

    @contextmanager
    def only_in(self, folder: Path) -> Iterator[None]:
        """Fail if the block opens a file outside of `folder`."""
        self._paths = []
        try:
            yield
        finally:
            paths, self._paths = self._paths, None
        outside = [path for path in paths if not Path(os.path.realpath(path)).is_relative_to(folder)]
        assert not [path for path in outside if not path.startswith((sys.prefix, sys.base_prefix))], outside


def changed(draw: Draw, file: Path) -> None:
    """Change the database as its owner could."""
    for _ in range(draw.randint(1, 3)):
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database:
            if draw.chance(0.6):
                table = draw.choice(["adapters", "adapters", "aliases", "tags"])
                columns = [name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")]
                unlock = "UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '         ')"
                database.executescript(UNLOCKED + unlock)
                script = f"UPDATE {table} SET {draw.choice(columns or ['path'])} = {draw.choice(VALUES)}"
                script += draw.choice(["", " WHERE rowid = 2"])
            else:
                script = draw.choice([*SCHEMAS, *(UNLOCKED + words for words in SECRET_SCHEMAS)])
            draw.say(script[:80])
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database:
            database.executescript(script)
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database:
            lock = "UPDATE sqlite_master SET sql = replace(sql, '         ', ' NOT NULL')"
            database.executescript(UNLOCKED + lock)


def other_pages(draw: Draw, raw: bytes) -> bytes:
    """The pages of the file in another order, or some of them twice, and cells or the header with other numbers."""
    size = int.from_bytes(raw[16:18], "big")
    pages = [bytearray(raw[start : start + size]) for start in range(0, len(raw), size)]
    for _ in range(draw.randint(1, 4)):
        one, other = draw.randint(0, len(pages) - 1), draw.randint(0, len(pages) - 1)
        match draw.say(draw.choice(["swap", "copy", "number", "number", "header"])):
            case "swap":
                pages[one], pages[other] = pages[other], pages[one]
            case "copy":
                pages[one] = bytearray(pages[other])
            case "number":
                at = draw.randint(0, 40) if draw.chance() else draw.randint(0, size - 4)
                pages[one][at : at + 4] = draw.randint(0, len(pages) + 2).to_bytes(4, "big")
            case "header":
                pages[0][draw.randint(16, 99)] = draw.choice([0, 1, 2, 3, 4, 5, 10, 13, 255])
    return b"".join(pages)


@cases("index")
def test_a_broken_index(natives: dict[str, NativeAdapter], area: Path, examples: int) -> None:
    folder = (area / "adapters").resolve()
    for place, method in zip((*ADAPTERS, "../outside"), ("tl6", "tl5", "lora", "vera"), strict=True):
        native = natives[method]
        save_adapter(folder / place, native)
    for words in ([], ["alias", "prod", "one"], ["alias", "best", "runs/three"], ["tag", "one", "keep", "good"]):
        assert call("index", [str(folder), *words]) == 0
    (folder / "linked").symlink_to(area / "outside")
    file, beside = folder / INDEX_FILE, [folder / f"{INDEX_FILE}{ending}" for ending in ("-journal", "-wal", "-shm")]
    whole, opened = file.read_bytes(), Opened()

    def body(draw: Draw) -> object:
        clear(file, *beside)
        file.write_bytes(whole)
        match draw.say(draw.choice(["bytes", "pages", "pages", "changed", "changed", "changed", "odd"])):
            case "bytes":
                file.write_bytes(damaged(draw, whole))
            case "pages":
                file.write_bytes(other_pages(draw, whole))
            case "changed":
                changed(draw, file)
                if draw.chance(0.2):
                    file.write_bytes(damaged(draw, file.read_bytes()))
            case "odd":
                odd_place(draw, file)
        for path in draw.sample(beside, 1) if draw.chance(0.2) else []:
            path.unlink(missing_ok=True)
            path.write_bytes(draw.choice([*NASTY, whole]))
            if draw.chance():
                odd_place(draw, path)
        words = draw.choice(ACTIONS)
        draw.say(" ".join(words))

        def action() -> int:
            with bounded(), opened.only_in(folder), redirect_stdout(StringIO()) as said:
                status = call("index", [str(folder), *words])
            printable(*said.getvalue().split("\n"))
            return status

        found = outcome(action, unchanged=area, names=(str(folder),))
        assert isinstance(found, UserError) or found in (0, 1)
        return found

    explore("index", examples, body, addresses=MAPPED)


# Made to harm ------------------------------------------------------------------------------------------------------

PAGE = 512  # bytes, SQLite's smallest


@pytest.fixture
def folder(native: NativeAdapter, area: Path) -> Path:
    """A folder with the adapter `one` and its index, beside an adapter that is not in it."""
    for place in ("adapters/one", "outside"):
        save_adapter(area / place, native)
    assert call("index", [str(area / "adapters")]) == 0
    return area / "adapters"


def asked(folder: Path, *words: str) -> object:
    """What an action on the folder's index comes to, within 2 s and 1 GB; it changes nothing."""

    def action() -> int:
        with bounded():
            return call("index", [str(folder), *words])

    return outcome(action, unchanged=folder.parent, names=(str(folder / INDEX_FILE),))


def assert_not_used(folder: Path) -> None:
    for words in (["find"], ["verify"], ["find", "--json", "--name", "o*"], ["diff", "one", "one"]):
        found = asked(folder, *words)
        assert isinstance(found, UserError) and str(found).endswith(f"write it with `tiedlora index {folder}`"), words


def change(folder: Path, script: str) -> None:
    with closing(sqlite3.connect(folder / INDEX_FILE)) as database:
        database.executescript(script)


def replace(folder: Path, script: str) -> None:
    """Another database in place of the index, with its version."""
    (folder / INDEX_FILE).unlink()
    change(folder, f"PRAGMA page_size = {PAGE}; PRAGMA user_version = {FORMAT}; {script}")


def columns(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / INDEX_FILE)) as database:
        return [name for _, name, *_ in database.execute("PRAGMA table_info(adapters)")]


def view(folder: Path, rows: str, **values: str) -> None:
    """The name `adapters` for a view of these rows."""
    selected = ", ".join(f"{values.get(name, 'x')} AS {name}" for name in columns(folder))
    replace(folder, f"CREATE VIEW adapters AS WITH RECURSIVE t(x) AS ({rows}) SELECT {selected} FROM t")


def add_column(folder: Path, words: str) -> None:
    change(folder, f"ALTER TABLE adapters ADD COLUMN {words}")


NO_INDEX: dict[str, Callable[[Path], None]] = {
    "a view that never ends": lambda folder: view(folder, NUMBERS),
    "a view of 3,000,000 rows": lambda folder: view(folder, f"{NUMBERS} LIMIT 3000000"),
    "a view of gigabytes": lambda folder: view(folder, "SELECT 1", path="hex(zeroblob(400000000))"),
    "a generated column": lambda folder: add_column(folder, "more AS (hex(zeroblob(400000000)))"),
    "a default": lambda folder: add_column(folder, "more DEFAULT 1"),
    "a trigger": lambda folder: change(
        folder, "CREATE TRIGGER t AFTER INSERT ON adapters BEGIN DELETE FROM adapters; END"
    ),
    "a virtual table": lambda folder: replace(
        folder, f"CREATE VIRTUAL TABLE adapters USING fts4({', '.join(columns(folder))})"
    ),
    "an index of an expression": lambda folder: change(folder, "CREATE INDEX more ON adapters (hex(path))"),
    "another table": lambda folder: change(folder, "CREATE TABLE more (x)"),
    "columns without types": lambda folder: replace(folder, f"CREATE TABLE adapters ({', '.join(columns(folder))})"),
    "200,000 tables": lambda folder: replace(
        folder,
        f"CREATE TABLE t (x); PRAGMA writable_schema = 1; INSERT INTO sqlite_master WITH RECURSIVE t(x) AS ({NUMBERS}"
        " LIMIT 200000) SELECT 'table', 't' || x, 't' || x, 2, 'CREATE TABLE t' || x || '(a, b, c, d, e)' FROM t",
    ),
    "another format": lambda folder: change(folder, f"PRAGMA user_version = {FORMAT - 1}"),
}


@pytest.mark.parametrize("case", NO_INDEX)
def test_what_is_not_written_by_this_program_is_not_read(folder: Path, case: str) -> None:
    NO_INDEX[case](folder)
    assert_not_used(folder)


@pytest.mark.parametrize(
    "values",
    [
        "parameters = 'x'", "parameters = 1.5", "name = x'05'", "base_model = x'07'", "base_model = NULL",
        "size = 'abc'", "size = -1", "rank = 9223372036854775807", "alpha = 9e999", "alpha = 'x'", "date = NULL",
        "scores = x'00'", "task = x'00'", "sha256 = ''", "path = '/etc'", "path = '../outside'", "path = ''",
        "path = 'one/../../outside'", "path = char(0) || 'one'", "run = '/etc'", "name = cast(x'ff' AS TEXT)",
        "name = hex(zeroblob(500))", "scores = hex(zeroblob(40000000))",
    ],
)  # fmt: skip
def test_rows_that_no_adapter_has_are_not_read(folder: Path, values: str) -> None:
    words, blanks = " NOT NULL", "         "
    for before, after, script in ((words, blanks, f"UPDATE adapters SET {values}"), (blanks, words, "")):
        replaced = f"replace(sql, '{before}', '{after}')"
        change(folder, f"PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql = {replaced}")
        change(folder, script)
    assert_not_used(folder)


@pytest.mark.parametrize(
    "row",
    [
        "aliases VALUES ('../one', 'one')", "aliases VALUES ('', 'one')", "aliases VALUES ('a', '../outside')",
        "aliases VALUES ('a' || char(10), 'one')", "aliases VALUES (x'61', 'one')", "tags VALUES ('one', 'a b')",
        "tags VALUES ('/etc', 'a')", "tags VALUES ('one', hex(zeroblob(65)))", "tags VALUES ('one', x'61')",
    ],
)  # fmt: skip
def test_labels_that_nobody_gave_are_not_read(folder: Path, row: str) -> None:
    change(folder, f"INSERT INTO {row}")
    assert_not_used(folder)


def test_many_labels_and_copies_take_no_long_time(folder: Path) -> None:
    """Every adapter is a copy of every other one, and of its start."""
    own = {"path": "'p' || x", "init_from": "'p'", "init_sha256": "sha256", "checkpoints": "sha256 || ',' || sha256"}
    copies = ", ".join(own.get(name, name) for name in columns(folder))
    change(
        folder,
        f"""INSERT INTO adapters WITH RECURSIVE t(x) AS ({NUMBERS} LIMIT 2000) SELECT {copies} FROM adapters, t;
        INSERT INTO tags WITH RECURSIVE t(x) AS ({NUMBERS} LIMIT 20000) SELECT 'p' || (x % 2000), 't' || x FROM t;
        INSERT INTO aliases WITH RECURSIVE t(x) AS ({NUMBERS} LIMIT 20000) SELECT 'a' || x, 'p' || (x % 2000) FROM t;
        UPDATE aliases SET path = 'p1' WHERE path = 'p0'; UPDATE tags SET path = 'p1' WHERE path = 'p0'""",
    )
    assert asked(folder, "lineage", "a7") == asked(folder, "find", "--tag", "t7", "--alias", "a*") == 0


@pytest.mark.parametrize("changed", ["adapters SET scores", "sqlite_master SET sql"])
def test_a_value_longer_than_any_row_is_not_read(folder: Path, changed: str) -> None:
    change(folder, f"PRAGMA writable_schema = 1; UPDATE {changed} = '-- ' || hex(zeroblob(300000))")
    assert "string or blob too big" in str(asked(folder, "find"))
    assert_not_used(folder)


def interior_page(child: int, cells: int) -> bytes:
    """A page of a table's tree whose `cells` + 1 children are all the page `child`."""
    page = bytearray(PAGE)
    start = PAGE - 5 * cells
    struct.pack_into(">BHHHBI", page, 0, 5, 0, cells, start, 0, child)
    for cell in range(cells):
        struct.pack_into(">H", page, 12 + 2 * cell, start + 5 * cell)
        struct.pack_into(">IB", page, start + 5 * cell, child, 1)
    return bytes(page)


@pytest.mark.parametrize(("levels", "cells"), [(4, 70), (17, 70), (30_000, 1)])
def test_a_tree_of_one_row_read_without_end_is_not_read(folder: Path, levels: int, cells: int) -> None:
    """A file of 12 kB has 10^31 rows so. SQLite's own check of a file's pages overflows its stack on deep trees."""
    change(folder, f"PRAGMA page_size = {PAGE}; VACUUM")
    with closing(sqlite3.connect(folder / INDEX_FILE)) as database:
        root = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'adapters'").fetchone()[0]
    raw = (folder / INDEX_FILE).read_bytes()
    pages = [raw[start : start + PAGE] for start in range(0, len(raw), PAGE)]
    leaf, pages[root - 1] = pages[root - 1], interior_page(len(pages) + 1, cells)
    pages += [interior_page(len(pages) + 2 + level, cells) for level in range(levels)] + [leaf]
    pages[0] = pages[0][:28] + struct.pack(">I", len(pages)) + pages[0][32:]
    (folder / INDEX_FILE).write_bytes(b"".join(pages))
    assert_not_used(folder)


@pytest.mark.parametrize("size", [2**26 + 1, 2**40])
def test_a_sparse_file_is_not_read(folder: Path, size: int) -> None:
    os.truncate(folder / INDEX_FILE, size)
    assert_not_used(folder)


@pytest.mark.parametrize("place", ["/dev/zero", "outside/adapter_config.json", "moved.sqlite"])
def test_a_link_is_not_followed(folder: Path, area: Path, place: str) -> None:
    (folder / INDEX_FILE).rename(area / "moved.sqlite")
    (folder / INDEX_FILE).symlink_to(area / place)
    assert_not_used(folder)


@pytest.mark.parametrize("ending", ["-journal", "-wal"])
def test_files_that_sqlite_would_read_beside_it_are_not_opened(
    folder: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    """A pipe that nobody writes to."""
    if ending == "-wal":
        raw = bytearray((folder / INDEX_FILE).read_bytes())
        raw[18:20] = b"\2\2"  # a database in the mode that has such a file
        (folder / INDEX_FILE).write_bytes(raw)
    os.mkfifo(folder / (INDEX_FILE + ending))
    assert asked(folder, "find", "--json") == 0 or ending == "-wal"
    assert ending == "-wal" or json.loads(capsys.readouterr().out)["name"] == "one"


@pytest.mark.parametrize("words", [["verify"], ["diff", "one", "linked"]])
def test_an_adapter_behind_a_link_is_not_opened(
    folder: Path, area: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """The path of the row is inside; where it leads is not."""
    (folder / "linked").symlink_to(area / "outside")
    change(folder, f"INSERT INTO adapters SELECT 'linked', 'linked', {', '.join(columns(folder)[2:])} FROM adapters")
    found = outcome(lambda: call("index", [str(folder), *words]), unchanged=area, names=(str(folder / "linked"),))
    said = f"{folder / 'linked'}: a link leads out of {folder}"
    assert said in (str(found) if words[0] == "diff" else capsys.readouterr().out) and found != 0
