"""Hostfiles that are broken: hosts that can be used, or one clear line."""

from __future__ import annotations

from pathlib import Path

from fuzzing import Draw, damaged, explore, outcome, sizes
from hypothesis import strategies as st

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.config.hosts import read_hostfile

WHOLE = b"# the cluster\nnode1 slots=8\n\n10.0.0.2\tslots=4  # small\nnode-3.local slots=16\n"
PARTS = ("node1", " slots=", "2", "\n")  # of a line
STRANGE = (
    ["node2", "-o", "~", "#", "é", "a\0b", "a\x1bb", "\ufeffa", "a" * 5000, "", "a b", "a@b"],
    ["\tslots=", "slots=", " slots = ", " ", " max_slots="],
    ["0", "-1", "1e3", "²", "٣", "0x8", "999999", "1000000", "9" * 5000, "", "1 max_slots=2"],
    ["\r\n", "\r", "\u2028", " # x\n", "\0", ""],
)


def strange_line(draw: Draw) -> str:
    """A line with one or two of its parts strange."""
    parts = list(PARTS)
    for place in draw(st.lists(st.integers(0, 3), min_size=1, max_size=2)):
        parts[place] = draw(st.sampled_from(STRANGE[place]))
    return "".join(parts)


@sizes(200, 3000)
def test_a_broken_hostfile(tmp_path: Path, examples: int) -> None:
    file = tmp_path / "hosts"

    def body(draw):  # type: ignore[no-untyped-def]
        if draw(st.booleans()):
            raw = damaged(draw, WHOLE)
        else:
            raw = "".join(strange_line(draw) for _ in range(draw(st.integers(1, 3)))).encode()
        file.write_bytes(raw)
        found = outcome(lambda: read_hostfile(file), unchanged=tmp_path, names=(str(file),))
        if isinstance(found, UserError):
            return
        assert found and len({host.name for host in found}) == len(found)
        for host in found:
            assert 1 <= host.slots <= 999_999
            assert host.name.isprintable() and not host.name.startswith("-") and " " not in host.name

    explore(examples, body)
