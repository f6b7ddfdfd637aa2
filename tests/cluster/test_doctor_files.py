"""Whether a folder is shared: a file that one host writes is looked for on the others."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from megatron_tiedlora.cluster.doctor import rank


def test_a_file_that_is_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".doctor-x"
    assert rank._write(str(path)) == "" and rank._is_seen(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert rank._write(str(path)) == "File exists"
    monkeypatch.setattr(rank, "_SHARED_SECONDS", 0.3)
    begin = time.monotonic()
    assert not rank._is_seen(str(tmp_path / ".doctor-y")) and time.monotonic() - begin < 5


def test_a_full_disk_takes_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        (folder / "filler").write_bytes(bytes(4096))
        assert rank._write(str(folder / ".doctor-x")) == "No space left on device"
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)
