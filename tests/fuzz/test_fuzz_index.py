"""A broken `adapters.sqlite`: rows of adapters in its folder, or one line; no other file is opened."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
from damage import NASTY, clear, damaged, odd_place
from fuzzing import MAPPED, Draw, bounded, cases, explore, outcome, printable
from native_files import with_adapter
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.native_adapter import save_adapter
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.sharing.index import INDEX_FILE

ADAPTERS = ("one", "two", "runs/three")
VALUES = ("NULL", "-1", "0", "1", "7", "1.5", "9e999", "-9e999", "9223372036854775807", "''", "'x'", "'abc'", "x'00'",
          "x'ff80'", "cast(x'c328' AS TEXT)", "char(0)", "char(27) || '[2J'", "'/etc'", "'../outside'", "'one/../..'",
          "'/proc/self/environ'", "'linked'", "'one'", "hex(zeroblob(300))", "hex(zeroblob(3000000))",
          "zeroblob(3000000)", "'[' || hex(zeroblob(50000))", "hex(zeroblob(32))", "'*'", "'tl6'")  # fmt: skip
ENDLESS = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t)"
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
ACTIONS = (["find"], ["find", "--json"], ["verify"], ["diff", "one", "two"], ["find", "--name", "*o*"],
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
    for _ in range(draw.number(1, 3)):
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as database:
            if draw.chance(0.6):
                columns = [name for _, name, *_ in database.execute("PRAGMA table_info(adapters)")]
                unlock = "UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '         ')"
                database.executescript(UNLOCKED + unlock)
                script = f"UPDATE adapters SET {draw.pick(columns or ['path'])} = {draw.pick(VALUES)}"
                script += draw.pick(["", " WHERE rowid = 2"])
            else:
                script = draw.pick([*SCHEMAS, *(UNLOCKED + words for words in SECRET_SCHEMAS)])
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
    for _ in range(draw.number(1, 4)):
        one, other = draw.number(0, len(pages) - 1), draw.number(0, len(pages) - 1)
        match draw.say(draw.pick(["swap", "copy", "number", "number", "header"])):
            case "swap":
                pages[one], pages[other] = pages[other], pages[one]
            case "copy":
                pages[one] = bytearray(pages[other])
            case "number":
                at = draw.number(0, 40) if draw.chance() else draw.number(0, size - 4)
                pages[one][at : at + 4] = draw.number(0, len(pages) + 2).to_bytes(4, "big")
            case "header":
                pages[0][draw.number(16, 99)] = draw.pick([0, 1, 2, 3, 4, 5, 10, 13, 255])
    return b"".join(pages)


@cases("index")
def test_a_broken_index(tmp_path_factory: pytest.TempPathFactory, area: Path, examples: int) -> None:
    base = write_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=False)
    folder = (area / "adapters").resolve()
    for place, method in zip((*ADAPTERS, "../outside"), ("tl6", "tl5", "lora", "vera"), strict=True):
        native = with_adapter(base, method, (1, 3))[1]
        save_adapter(folder / place, native.config, native.base, native.state)
    assert call("index", [str(folder)]) == 0
    (folder / "linked").symlink_to(area / "outside")
    file, beside = folder / INDEX_FILE, [folder / f"{INDEX_FILE}{ending}" for ending in ("-journal", "-wal", "-shm")]
    whole, opened = file.read_bytes(), Opened()

    def body(draw: Draw) -> object:
        clear(file, *beside, area / "elsewhere")
        file.write_bytes(whole)
        match draw.say(draw.pick(["bytes", "pages", "pages", "changed", "changed", "changed", "odd"])):
            case "bytes":
                file.write_bytes(damaged(draw, whole))
            case "pages":
                file.write_bytes(other_pages(draw, whole))
            case "changed":
                changed(draw, file)
                if draw.chance(0.2):
                    file.write_bytes(damaged(draw, file.read_bytes()))
            case "odd":
                odd_place(draw, file, elsewhere=area / "elsewhere")
        for path in draw.some(beside, 1) if draw.chance(0.2) else []:
            path.unlink(missing_ok=True)
            path.write_bytes(draw.pick([*NASTY, whole]))
            if draw.chance():
                odd_place(draw, path, elsewhere=area / "elsewhere")
        words = draw.pick(ACTIONS)
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
