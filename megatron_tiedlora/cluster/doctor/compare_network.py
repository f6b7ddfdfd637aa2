"""Find what is wrong with names, addresses, layout and files; as compare.py does for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_tiedlora.base.wording import bytes_in_words, enumerate_names
from megatron_tiedlora.cluster.doctor.compare import answering, error, usual_value, warning
from megatron_tiedlora.cluster.doctor.probe import is_loopback
from megatron_tiedlora.cluster.doctor.rank import group_members, hosts_of_ranks
from megatron_tiedlora.cluster.doctor.records import UNREADABLE, Finding, HostReport, ParallelConfig, PathContent

_LITTLE_SPACE = 1 << 30  # a checkpoint of a tied adapter is far smaller; logs and an exported model are not
_MOST_NAMED = 3  # of the files that differ

# Names, addresses -------------------------------------------------------------------------------------------------


def look_at_names(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Names that do not resolve or resolve to the host itself, missing interfaces, a machine listed twice."""
    first = hosts[0].name
    names: dict[str, list[str]] = {}
    for host, probe in answering(hosts):
        names.setdefault(probe.machine, []).append(host.name)
        for variable, value in probe.socket_names.items():
            if not any(_matches(variable, value, name) for name in probe.interfaces):
                yield error(
                    "no_interface",
                    [host.name],
                    f"{host.name}: {variable}={value}, but its interfaces are {', '.join(probe.interfaces)}",
                    f"set {variable} to an interface that every host has, or unset it",
                )
        if len(hosts) == 1:
            continue
        if "GLOO_SOCKET_IFNAME" not in probe.socket_names:
            yield from _look_at_own_name(host, probe.hostname, probe.name_addresses, on_gpus=bool(probe.gpus))
        if not probe.master_addresses:
            yield error(
                "name_unknown",
                [host.name],
                f"{host.name} does not know the first host's name, {first}",
                f"add {first} to its /etc/hosts or name server",
            )
        elif host.name != first and all(map(is_loopback, probe.master_addresses)):
            yield error(
                "master_address",
                [host.name],
                f"on {host.name} the first host's name, {first}, resolves to {host.name} itself"
                f" ({', '.join(probe.master_addresses)})",
                f"correct {first} in its /etc/hosts",
            )
    for twice in names.values():
        if len(twice) > 1:
            yield error(
                "same_machine",
                twice,
                f"{enumerate_names(twice)} are one machine",
                "keep one line for it in the hostfile, with all its slots",
            )


def _look_at_own_name(host: HostReport, name: str, addresses: Sequence[str], *, on_gpus: bool) -> Iterator[Finding]:
    """gloo listens on the address that the host's own name resolves to. NCCL looks for an interface itself."""
    if addresses and not all(map(is_loopback, addresses)):
        return
    probe = host.probe
    interface = None if probe is None else interface_in_use(probe.interfaces, probe.peer_address)
    there = f"resolves to {', '.join(addresses)}, which other hosts cannot reach"
    found = there if addresses else "does not resolve there"
    yield (warning if on_gpus else error)(
        "loopback_name",
        [host.name],
        f"{host.name}: its own name, {name}, {found}",
        f"give {name} its real address in its /etc/hosts, or set GLOO_SOCKET_IFNAME={interface or 'INTERFACE'}",
    )


def interface_in_use(interfaces: Mapping[str, Sequence[str]], address: str | None) -> str | None:
    """The interface that has `address`."""
    return next((name for name, addresses in interfaces.items() if address in addresses), None)


def _matches(variable: str, value: str, interface: str) -> bool:
    """Match as the library does: gloo takes names; NCCL takes prefixes, `=eth0` for a name, `^eth0` for any other."""
    if variable == "GLOO_SOCKET_IFNAME":
        return interface in value.split(",")
    negated, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    wanted = [name.partition(":")[0] for name in value.lstrip("^=").split(",")]
    found = any(interface == name if exact else interface.startswith(name) for name in wanted)
    return found != negated


# Layout ------------------------------------------------------------------------------------------------------------


def look_at_layout(hosts: Sequence[HostReport], layout: ParallelConfig) -> Iterator[Finding]:
    """Tensor parallel groups that span hosts: they send the most messages."""
    groups = [hosts_of_ranks(hosts, ranks) for ranks in group_members(layout).get("tensor", ())]
    spread = [where for where in groups if len(where) > 1]
    if spread:
        yield warning(
            "tensor_parallel_across_hosts",
            list(dict.fromkeys(name for where in spread for name in where)),
            f"{len(spread)} tensor parallel group(s) span hosts, the first {enumerate_names(spread[0])}; every layer"
            " waits for their network",
            "choose a --tensor_parallel that divides the slots of every host, and use --pipeline_parallel across hosts",
        )


# Files -------------------------------------------------------------------------------------------------------------


def compare_paths(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Input files of a job that are missing, cannot be read or differ."""
    keys = {key: None for _, probe in answering(hosts) for key in probe.paths}
    for key in keys:
        contents = {host.name: probe.paths[key] for host, probe in answering(hosts)}
        flag = key.partition(":")[0]  # a flag that names two files has them as FLAG:1 and FLAG:2
        yield from _look_for_paths(flag, contents)
        there = {name: content for name, content in contents.items() if content.kind in ("file", "folder", "cached")}
        for name, content in there.items():
            path = content.path
            closed = [file for file, value in content.files.items() if value == UNREADABLE]
            if closed:
                yield error(
                    "path_unreadable", [name], f"{name}: --{flag} {path}: {closed[0]} cannot be read", "chmod a+r it"
                )
        yield from _compare_contents(flag, there)


def _look_for_paths(flag: str, contents: Mapping[str, PathContent]) -> Iterator[Finding]:
    """Paths that are missing, or were not checked."""
    local = next((content.path for content in contents.values() if content.kind in ("file", "folder")), None)
    by_kind: dict[str, list[str]] = {}
    for name, content in contents.items():
        # A path that exists on one host is not taken for a hub id on another.
        is_missing = local is not None and content.kind in ("not_cached", "unchecked")
        by_kind.setdefault("missing" if is_missing else content.kind, []).append(name)
    for kind, names in by_kind.items():
        everywhere = len(names) == len(contents)
        given = f"--{flag} {local if kind == 'missing' and local else contents[names[0]].path}"
        where = "every host" if everywhere else enumerate_names(names)
        if kind == "missing":
            fix = "correct the path, or download it first" if everywhere else "copy it there, or mount its file system"
            yield error("path_missing", names, f"{given} is missing on {where}", fix)
        elif kind == "not_cached":
            message = f"{given} is not a folder, and is not in the Hugging Face cache of {where}"
            fix = "`hf download` it, or set HF_HOME to a cache that has it; otherwise a job downloads it"
            yield warning("hub_not_cached", names, message, fix)
        elif kind == "unchecked":
            message = f"{given} is not a file on {where}; whether it is cached as a data set of the hub was not checked"
            fix = "make sure that the hosts reach the hub, or load the data set there first, or give files"
            yield warning("hub_not_checked", names, message, fix)


def _compare_contents(flag: str, contents: Mapping[str, PathContent]) -> Iterator[Finding]:
    if not contents:
        return
    keys = {name: tuple(sorted(content.files.items())) for name, content in contents.items()}
    usual = dict(usual_value(list(keys.values())))
    copy = "copy it again from a host where it is right"
    for name, content in contents.items():
        if content.files == usual or UNREADABLE in content.files.values():
            continue
        other = [file for file in sorted({*content.files, *usual}) if content.files.get(file) != usual.get(file)]
        more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
        # The hub's client updates its cache itself if it has a network.
        yield (warning if content.kind == "cached" else error)(
            "path_differs",
            [name],
            f"{name}: --{flag} {content.path} differs from the other hosts': {', '.join(other[:_MOST_NAMED])}{more}",
            "`hf download` it again" if content.kind == "cached" else copy,
        )


def look_at_output(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Output folders that are not writable or have little space."""
    for host, probe in answering(hosts):
        if probe.output is None:
            continue
        if not probe.output.writable:
            yield error(
                "output_not_writable",
                [host.name],
                f"{host.name}: --output_dir {probe.output.path}: no right to write in {probe.output.existing}",
                "choose another folder, or get the permission",
            )
        if probe.output.free_bytes < _LITTLE_SPACE:
            yield warning(
                "disk",
                [host.name],
                f"{host.name}: --output_dir {probe.output.path}: {bytes_in_words(probe.output.free_bytes)} free",
                "free some space: a save that does not fit ends the run",
            )
