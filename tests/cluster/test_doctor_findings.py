"""What the doctor finds wrong with a set of answers: each thing once, by its host, and nothing on a healthy set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megatron_tiedlora.cluster import doctor_rank
from megatron_tiedlora.cluster.doctor import Trial, compare_hosts, explain_output, explain_silence, host_table
from megatron_tiedlora.runtime.machine import Finding, Gpu, MachineRecord

NAMES = ("nodea", "nodeb", "nodec")
SLOTS = 2
GIB = 1 << 30
Changes = Mapping[str, Any]


def answer(name: str, **changes: Any) -> doctor_rank.HostAnswer:
    """A healthy host's answer, with GPUs if they are among the changes, which are of the answer or its machine."""
    number = NAMES.index(name) + 1
    versions = {"python": "3.11.7", "torch": "2.12.0", "deepspeed": "0.19.8", "transformers": "5.1.0"}
    machine: dict[str, Any] = {
        "versions": {**versions, "megatron_tiedlora": "0.1.0", "safetensors": "0.6.0"},
        "paths": {"python": "/env/bin/python"},
        "extras": {},
        "variables": {},
        "host": name,
        "id": f"{name} boot{number}",
        "source_hash": "0123456789ab",
        "infiniband": [],
        "num_cores": 8,
        "memory_bytes": 64 * GIB,
        "free_memory_bytes": 60 * GIB,
        "shm_bytes": 32 * GIB,
        "nofile": 1024,
        "memlock": 8 << 20,
        "name_addresses": [f"10.0.0.{number}"],
        "interfaces": {"lo": ["127.0.0.1"], "eth0": [f"10.0.0.{number}"]},
    }
    values: dict[str, Any] = {"output_free_bytes": 99 * GIB}
    values |= {name: value for name, value in changes.items() if name in values}
    machine |= {name: value for name, value in changes.items() if name not in values}
    return doctor_rank.HostAnswer(machine=MachineRecord(**machine), **values)


def hosts(
    changes: Mapping[str, Changes] | None = None, *, names: tuple[str, ...] = NAMES
) -> list[doctor_rank.HostReport]:
    """Hosts that are healthy but for `changes` of their answers, by name."""
    changes = changes or {}
    return [
        doctor_rank.HostReport(
            name=name,
            slots=SLOTS,
            first_rank=index * SLOTS,
            answer=answer(name, **changes.get(name, {})),
            clock=doctor_rank.Clock(skew=0.001, margin=0.002),
        )
        for index, name in enumerate(names)
    ]


def layout(num_ranks: int = 6, tensor: int = 2, pipeline: int = 1) -> doctor_rank.ParallelConfig:
    return doctor_rank.ParallelConfig(
        num_ranks=num_ranks,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        data_parallel=num_ranks // tensor // pipeline,
        master_host="nodea",
        master_port=29500,
        backend="gloo",
    )


def examined(reports: list[doctor_rank.HostReport]) -> list[Finding]:
    return list(compare_hosts(reports, max_skew=1.0))


def versions(**changes: str) -> Changes:
    return {"versions": {**answer("nodea").machine.versions, **changes}}


def h100s(*free: int, name: str = "H100") -> Changes:
    same = {"name": name, "total_bytes": 80 * GIB, "capability": (9, 0)}
    return {"gpus": [Gpu(free_bytes=each * GIB, **same) for each in free or (79, 79)]}


def test_healthy_hosts_have_no_finding() -> None:
    for names in (NAMES, NAMES[:2], NAMES[:1]):
        assert examined(hosts(names=names)) == []
        on_gpus = {name: {**h100s(), "cuda": "12.8", "nccl": "2.27.3"} for name in names}
        assert examined(hosts(on_gpus, names=names)) == []


# (what changes on which hosts, code, level, the hosts named, words of the message)
WRONG: dict[str, tuple[Mapping[str, Changes], str, str, list[str], str]] = {
    "torch": ({"nodeb": versions(torch="2.11.1")}, "version", "error", ["nodeb"], "is 2.11.1 on nodeb, but 2.12.0"),
    "first odd": ({"nodea": versions(torch="2.11.1")}, "version", "error", ["nodea"], "but 2.12.0 on nodeb and nodec"),
    "two odd": (
        {name: versions(deepspeed="1") for name in ("nodea", "nodec")}, "version", "error", ["nodeb"],
        "deepspeed is 0.19.8 on nodeb, but 1 on nodea and nodec",
    ),
    "safetensors": ({"nodec": versions(safetensors="1")}, "version", "warning", ["nodec"], "safetensors is 1 on nodec"),
    "ours": ({"nodec": versions(megatron_tiedlora="0.2")}, "version", "error", ["nodec"], "megatron_tiedlora is 0.2"),
    "ours, with its files": (
        {"nodeb": {**versions(megatron_tiedlora="0.2"), "source_hash": "f" * 12}}, "version", "error", ["nodeb"],
        "megatron_tiedlora is 0.2",
    ),
    "checkout": ({"nodeb": {"source_hash": "f" * 12}}, "source", "error", ["nodeb"], "ffffffffffff on nodeb"),
    "import": ({"nodeb": {"torch_error": "no libcudart"}}, "torch_broken", "error", ["nodeb"], "no libcudart"),
    "full": ({"nodeb": {"output_free_bytes": 9 << 20}}, "disk", "warning", ["nodeb"], "9.44 MB free"),
    "Debian": ({"nodeb": {"name_addresses": ["127.0.1.1"]}}, "loopback_name", "error", ["nodeb"], "127.0.1.1"),
    "IPv6": ({"nodeb": {"name_addresses": ["::1"]}}, "loopback_name", "error", ["nodeb"], "::1"),
    "nameless": ({"nodeb": {"name_addresses": []}}, "loopback_name", "error", ["nodeb"], "nodeb, does not resolve"),
    "twice": ({"nodeb": {"id": "nodea boot1"}}, "same_machine", "error", ["nodea", "nodeb"], "one machine"),
    "shm": ({"nodeb": {"shm_bytes": 64 << 20}}, "shm", "warning", ["nodeb"], "67.11 MB"),
    "files": ({"nodeb": {"nofile": 256}}, "nofile", "warning", ["nodeb"], "may open 256 files"),
    "locked": ({"nodeb": {"infiniband": ["mlx5_0"]}}, "memlock", "warning", ["nodeb"], "mlx5_0"),
    "cores": ({"nodeb": {"num_cores": 1}}, "cores", "warning", ["nodeb"], "2 ranks on 1 core"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_each_wrong_thing_is_found_once(case: str) -> None:
    changes, code, level, named, words = WRONG[case]
    (finding,) = examined(hosts(changes))
    assert (finding.code, finding.status, finding.hosts) == (code, level, named)
    assert words in finding.message and finding.fix
    assert all(name in finding.message for name in named)


def test_a_hosts_own_name_only_matters_among_several_and_where_gloo_listens_by_it() -> None:
    trap: Changes = {"name_addresses": ["127.0.1.1"]}
    assert examined(hosts({"nodea": trap}, names=NAMES[:1])) == []
    named = {"nodea": {**trap, "variables": {"GLOO_SOCKET_IFNAME": "eth0"}}}
    assert examined(hosts(named)) == []
    (finding,) = examined(hosts({"nodea": trap}))
    assert finding.code == "loopback_name" and "GLOO_SOCKET_IFNAME" in finding.fix
    on_gpus = {name: h100s() for name in NAMES}
    (finding,) = examined(hosts({**on_gpus, "nodea": {**on_gpus["nodea"], **trap}}))
    assert (finding.code, finding.status) == ("loopback_name", "warning")


@pytest.mark.parametrize(
    ("change", "code", "level"),
    [
        ({"gpus": []}, "gpus_differ", "error"),
        (h100s(name="A100"), "gpus_differ", "warning"),
        (h100s(79), "too_few_gpus", "error"),
        (h100s(79, 20), "gpu_memory_used", "warning"),
        ({"gpus": [h100s()["gpus"][0].model_copy(update={"capability": (7, 0)})] * 2}, "old_gpu", "warning"),
        ({**h100s(), "cuda": "12.6"}, "cuda_version", "error"),
        ({**h100s(), "nccl": "2.26.2"}, "nccl_version", "error"),
    ],
)
def test_gpus(change: Changes, code: str, level: str) -> None:
    changes = {name: {"cuda": "12.8", "nccl": "2.27.3", **h100s()} for name in NAMES}
    changes["nodeb"] = {**changes["nodeb"], **change}
    (finding,) = examined(hosts(changes))
    assert (finding.code, finding.status, finding.hosts) == (code, level, ["nodeb"])


def test_a_torch_that_is_too_old() -> None:
    (finding,) = examined(hosts({"nodea": versions(torch="2.9.1+cu128")}, names=NAMES[:1]))
    assert (finding.code, finding.status) == ("old_torch", "error")
    assert finding.message == "nodea: torch is 2.9.1+cu128, but this package needs 2.10 or later"


def test_gpus_are_in_the_table_and_their_free_memory_makes_no_host_an_odd_one() -> None:
    lines = host_table(hosts({"nodea": h100s(79, 79), "nodeb": h100s(79, 75), "nodec": h100s(78, 79)}))
    assert len(lines) == 4 and all("2 x H100  8 " in line for line in lines[1:])
    mixed = host_table(hosts({"nodea": h100s(79, 79), "nodeb": h100s(79, 75)}))
    assert "none*" in mixed[3] and mixed[4] == "* differs from most hosts"


def test_clocks_count_only_beyond_their_margin() -> None:
    healthy = hosts()
    for skew, margin, is_found in ((3.0, 0.1, True), (-3.0, 0.1, True), (3.0, 2.5, False), (0.5, 0.0, False)):
        late = [
            healthy[0],
            healthy[1].model_copy(update={"clock": doctor_rank.Clock(skew=skew, margin=margin)}),
            healthy[2],
        ]
        findings = examined(late)
        assert [(finding.code, finding.hosts) for finding in findings] == ([("clock", ["nodeb"])] if is_found else [])
        assert not is_found or ("ahead of" if skew > 0 else "behind") in findings[0].message


def test_hosts_without_an_answer_are_no_odd_ones() -> None:
    silent = [report.model_copy(update={"answer": None, "clock": None}) for report in hosts()]
    assert examined(silent) == []
    assert examined([*hosts()[:2], silent[2]]) == []


def test_a_group_is_where_the_grid_puts_it() -> None:
    assert layout(8, tensor=2, pipeline=2).groups() == {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "pipeline": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "data": [[0, 2], [1, 3], [4, 6], [5, 7]],
    }
    assert layout(1, tensor=1).groups() == {}


# Silence -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (["noise", "nodeb: ssh: connect to host nodeb: Connection timed out", "pdsh@nodea: nodeb: ssh"], "timed out"),
        (["nodea: fine", "bash: /env/bin/python: No such file", ""], "bash: /env/bin/python: No such file"),
        ([], "the launcher ended with status 1"),
    ],
)
def test_why_a_host_is_silent(printed: list[str], said: str) -> None:
    reports = [one.model_copy(update={"answer": None}) if one.name == "nodeb" else one for one in hosts()]
    for route, fix in (("ssh", "ssh nodeb true"), ("srun", "sinfo -R"), ("local", "same path there")):
        (finding,) = explain_silence(reports, Trial(printed=printed, status=1), route=route)
        assert (finding.code, finding.status, finding.hosts) == ("no_answer", "error", ["nodeb"])
        assert said in finding.message and finding.message.startswith("nodeb: ") and fix in finding.fix


def test_what_hosts_say_of_the_output_folder() -> None:
    def codes(said: dict[str, str]) -> list[tuple[str, str, list[str]]]:
        ranks = {one.name: one.first_rank for one in hosts()}
        reports = {ranks[name]: doctor_rank.RankReport(rank=ranks[name], output=why) for name, why in said.items()}
        findings = explain_output(hosts(), Trial(reports), "/runs/new")
        return [(finding.code, finding.status, finding.hosts) for finding in findings]

    assert codes({"nodea": "", "nodeb": "", "nodec": ""}) == [] == codes({})
    assert codes({"nodea": "", "nodeb": "", "nodec": "not seen"}) == [("output_not_shared", "warning", ["nodec"])]
    full = {"nodea": "No space left on device", "nodeb": "", "nodec": ""}
    assert codes(full) == [("output_not_writable", "error", ["nodea"])]
    closed = {"nodea": "", "nodeb": "no permission to write", "nodec": "not seen"}
    assert codes(closed) == [("output_not_writable", "error", ["nodeb"])]
