"""Commands on hosts: what ended how, limits that hold, and nothing that lives on."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
from host_commands import wait_until

from megatron_tiedlora.cluster.remote import Done, HostCommands, RemoteCommand, Transport, run_on_hosts

LOCAL = Transport("local")
pytestmark = pytest.mark.timeout(60)


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


def runs(pid: int) -> bool:
    """Whether a process runs; one that only waits to be buried does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_how_each_host_ended() -> None:
    done = run_on_hosts(["a", "b"], shell("echo out; echo oops >&2; exit 3"), limit=20, transport=LOCAL)
    assert set(done) == {"a", "b"}
    for host, end in done.items():
        assert (end.host, end.status, end.stdout, end.last_words) == (host, 3, "out\n", "oops")


def test_a_limit_holds_for_all_that_was_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    stubborn = f"trap '' TERM HUP; sleep 60 & echo $$ $! > {pids}; wait; sleep 60"
    background = f"sleep 60 & echo $! >> {pids}"  # which keeps the output open when the command itself is over
    for script in (stubborn, background):
        pids.write_text("")
        begin = time.monotonic()
        done = run_on_hosts(["a"], shell(script), limit=1, transport=LOCAL)["a"]
        assert done.status is None and time.monotonic() - begin < 8
        started = [int(pid) for pid in pids.read_text().split()]
        assert started
        wait_until(lambda pids=started: not any(map(runs, pids)), "their ends", limit=2)  # type: ignore[misc]


def test_the_input_ends_with_the_caller_and_lines_are_answered() -> None:
    def answer(command: RemoteCommand, line: str) -> None:
        if line == "ready":
            command.send("go")
        else:
            command.close_input()

    script = 'echo ready; read line; echo "got $line"; cat; echo over'
    done = run_on_hosts(["a"], shell(script), limit=20, transport=LOCAL, on_line=answer)["a"]
    assert (done.status, done.stdout) == (0, "ready\ngot go\nover\n")


def test_one_host_can_end_all() -> None:
    ended: list[str] = []

    def see(done: Done) -> None:
        ended.append(done.host)
        if done.host == "b":
            threading.Thread(target=running.end_all).start()

    running = HostCommands(LOCAL, limit=40, on_done=see)
    begin = time.monotonic()
    done = running.run({"a": shell("cat"), "b": shell("exit 1")})
    assert time.monotonic() - begin < 10 and sorted(ended) == ["a", "b"]
    assert done["b"].status == 1 and done["a"].status == 0  # its input ended
    late = running.run({"c": shell("echo never")})["c"]
    assert (late.status, late.stdout) == (None, "")


def test_an_error_in_the_callers_code_ends_the_commands() -> None:
    def fail(command: RemoteCommand, line: str) -> None:
        raise RuntimeError(line)

    with pytest.raises(RuntimeError, match=r"\d+"):
        run_on_hosts(["a", "b"], shell("echo $$; exec sleep 61"), limit=50, transport=LOCAL, on_line=fail)
    assert not any("61" in child.cmdline() for child in psutil.Process().children(recursive=True))


def test_words_arrive_as_they_were(tmp_path: Path) -> None:
    odd = ["it's", "a b", '$HOME "x"', "*", "a;b", "%h"]
    transport = Transport("local", environment={"ODD": "it's $HOME"}, folder=tmp_path)
    command = ["sh", "-c", 'pwd; printf "%s\\n" "$ODD" "$@"', "name", *odd]
    done = run_on_hosts(["a"], command, limit=20, transport=transport)["a"]
    assert done.stdout.splitlines() == [str(tmp_path.resolve()), "it's $HOME", *odd]
    # ssh hands one line to the host's shell, which takes it apart to the same words.
    line = Transport("ssh", environment={"ODD": "it's $HOME"}, folder=tmp_path).words("a", command, limit=9)[-1]
    assert subprocess.check_output(["sh", "-c", line], text=True, timeout=20) == done.stdout


def test_ssh_asks_nothing_and_gives_up(tmp_path: Path) -> None:
    words = Transport("ssh", ssh_port=2222).words("node", ["true"], limit=4)
    assert words[0] == "ssh" and words[-2:] == ["node", "exec true"]
    for option in ("BatchMode=yes", "ConnectTimeout=4", "ServerAliveInterval=5", "ControlPath=none"):
        assert option in words
    assert words[words.index("-p") + 1] == "2222"
    step = Transport("srun", folder=tmp_path).words("node", ["true"], limit=4)
    assert step[0] == "srun" and "--nodelist=node" in step
    assert step[-1] == f"cd {shlex.quote(str(tmp_path))} && exec true"


def test_a_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_on_hosts(["a"], ["no-such-program"], limit=20, transport=LOCAL)["a"].status == 127
    monkeypatch.setenv("PATH", os.devnull)
    done = run_on_hosts(["a"], ["true"], limit=20, transport=Transport("srun"))["a"]
    assert done.status == 127 and "srun" in done.last_words
