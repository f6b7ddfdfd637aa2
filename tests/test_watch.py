"""What launch/run.py concludes from a look at its launchers and hosts; test_launcher_watch.py has whole starts."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from launcher_jobs import make_job

from megatron_tiedlora.cluster import watch
from megatron_tiedlora.cluster.leftovers import Found, Report
from megatron_tiedlora.cluster.reach import Answers, JobHosts
from megatron_tiedlora.cluster.signals import StopSignals
from megatron_tiedlora.cluster.watch import Launcher, Times, Watch

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("reached", [True, False])
def test_a_host_that_gives_no_answer_for_a_while_does_not_end_the_job(
    reached: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its ranks may be well: the network, sshd or the file system may be slow."""
    monkeypatch.setattr(watch, "LINGER_SECONDS", 0.0)
    process = subprocess.Popen(["sleep", "50"], start_new_session=True)
    try:
        hosts = JobHosts(make_job(tmp_path / "job"), {}, limit=1)
        times = Times(look=1, grace=1, soon=1)
        watched = Watch([Launcher("mpirun", process)], hosts, StopSignals(), times, over=lambda: False)
        rank = Report("node1", (Found(1, "rank", "python"),))
        watched._take(Answers({"node1": rank}), fresh=False)
        for _ in range(3):
            time.sleep(0.05)
            watched._take(Answers({"here": Report("here", ())}, {} if reached else {"node1": "slow"}), fresh=False)
        if reached:
            process.wait(10)
        assert (process.poll() is None) is not reached
    finally:
        process.kill()
        process.wait()


def test_where_one_of_several_launchers_has_failed_the_others_are_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torchrun's agents would wait ten minutes for a host that does not come back.

    An end that is good is none, and neither is that of an ssh client whose agent lives.
    """
    monkeypatch.setattr(watch, "OTHERS_SECONDS", 0.2)
    ended, failed, works = (subprocess.Popen(["sh", "-c", code]) for code in ("exit 0", "exit 5", "exec sleep 50"))
    ended.wait()
    failed.wait()
    try:
        hosts, times = JobHosts(make_job(tmp_path / "job"), {}, limit=1), Times(look=1, grace=1, soon=1)
        for first, seen, stopped in ((ended, ["b"], False), (failed, ["a", "b"], False), (failed, ["b"], True)):
            launchers = [Launcher("torchrun on a", first), Launcher("torchrun on b", works)]
            watched = Watch(launchers, hosts, StopSignals(), times, over=lambda: False)
            agents = {host: Report(host, (Found(1, "agent", "python"),)) for host in seen}
            begun = time.monotonic()
            assert not watched._end_the_rest(begun)
            time.sleep(0.15)
            watched._see(Answers({**agents, "a": Report("a", (Found(1, "agent", "python"),))}), begun=begun - 1.0)
            watched._see(Answers(agents), begun=begun)
            assert watched._end_the_rest(begun + 0.25) is stopped
            assert watched._stop == (signal.SIGTERM if stopped else 0)
    finally:
        works.kill()
        works.wait()
