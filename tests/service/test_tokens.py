"""The file of keys: what it stores, who may read it, and that a key is found or not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.service.tokens import TokenFile, new_token


def test_a_new_key_belongs_to_its_owner_and_is_not_stored(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    alice, bob, second = new_token(file, "alice"), new_token(file, "bob"), new_token(file, "alice")
    tokens = TokenFile(file)
    assert [tokens.owner_of(key) for key in (alice, bob, second)] == ["alice", "bob", "alice"]
    assert alice.startswith("tml-") and len(alice) > 40
    assert file.stat().st_mode & 0o777 == 0o600
    assert alice not in file.read_text() and hashlib.sha256(alice.encode()).hexdigest() in file.read_text()


@pytest.mark.parametrize("key", ["", "tml-", "tml-x", "é", "\udcff", "x" * 100_000])
def test_other_keys_belong_to_nobody(tmp_path: Path, key: str) -> None:
    new_token(tmp_path / "tokens", "alice")
    assert TokenFile(tmp_path / "tokens").owner_of(key) is None


def test_a_change_of_the_file_counts_at_once_unless_it_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    alice = new_token(file, "alice")
    tokens = TokenFile(file)
    bob = new_token(file, "bob")
    assert tokens.owner_of(bob) == "bob"
    file.write_text("nonsense\n")
    assert tokens.owner_of(alice) == "alice"  # a slip ends nobody's run
    file.write_text(f"# only bob\n\nbob {hashlib.sha256(bob.encode()).hexdigest()}\n")
    assert (tokens.owner_of(alice), tokens.owner_of(bob)) == (None, "bob")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602])
def test_a_file_that_others_can_use_is_rejected(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "tokens"
    new_token(file, "alice")
    file.chmod(mode)
    for use in (lambda: TokenFile(file), lambda: new_token(file, "bob")):
        with pytest.raises(UserError, match=rf"mode {mode:04o}\). Run: chmod 600 "):
            use()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no tokens. Add one with --new_token OWNER"),
        ("alice\n", "line 1 is not OWNER SHA256"),
        ("# one\nalice tml-notadigest\n", "line 2 is not OWNER SHA256"),
        ("../x " + "0" * 64, "line 1 is not OWNER SHA256"),
    ],
)
def test_an_invalid_file_is_one_clear_line(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(UserError, match=said) as caught:
        TokenFile(file)
    assert "notadigest" not in str(caught.value)  # somebody may have put the key itself there


def test_a_missing_file_and_a_bad_name_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .No such file"):
        TokenFile(tmp_path / "tokens")
    for name in ("", "a b", "x" * 65, "a/b", "a\nb"):
        with pytest.raises(UserError, match="is not a name"):
            new_token(tmp_path / "tokens", name)
    assert not os.listdir(tmp_path)
