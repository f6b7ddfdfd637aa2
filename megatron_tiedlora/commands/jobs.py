"""Implement the commands for jobs, machines and adapter collections: run, sweep, plan, doctor, env, recipes, bench,
check-gpu, index and push.

Modules that need torch are imported inside the functions, so that `env` also works without torch.
"""

import gc
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from megatron_tiedlora.base import messages
from megatron_tiedlora.base.files import write_json, write_text
from megatron_tiedlora.base.installation import PACKAGE_FOLDER, require_extra, require_vllm
from megatron_tiedlora.base.messages import UserError, aligned_lines, count_text, os_errors, show, user_path
from megatron_tiedlora.base.output_folder import last_name, output_file, reject_existing
from megatron_tiedlora.config import tool_settings
from megatron_tiedlora.config.adapter_settings import IndexSettings, PushSettings
from megatron_tiedlora.config.job_settings import DoctorSettings, LaunchCommand, PlanCommand, SweepCommand
from megatron_tiedlora.config.tool_settings import CHECK_PARTS, BenchSettings, CheckGpuSettings, EnvSettings
from megatron_tiedlora.runtime.launch_env import prepare_environment, rank_and_world_size
from megatron_tiedlora.runtime.machine import in_words, machine_record

HERE = Path(__file__).resolve().parent
_MEETING_MINUTES = 10.0  # time limit for the rendezvous in plan --measure
_HEADING = ("name", "base", "method", "rank", "targets", "parameters", "task", "date", "aliases", "tags", "path")

CHECK_SECONDS, CHECK_SECONDS_OF_SEVERAL = 480.0, 600.0  # the default time of check-gpu on one GPU, and on several
RANKS_OF_SEVERAL = (220, 400)  # as in CHECK_PARTS, for the part `ranks` on several GPUs
NO_GPU_STATUS = 2


def run(command: LaunchCommand, *, scripts: Path = HERE) -> int:
    """Start a job and wait until it ends. The ranks run train.py in the folder `scripts`. Return the exit status."""
    from megatron_tiedlora.cluster.start import launch

    return launch(command, scripts=scripts)


def sweep(command: SweepCommand, *, scripts: Path = HERE) -> int:
    """Run a sweep. Its jobs run train.py and evaluate.py in the folder `scripts`. Return the exit status."""
    require_extra("train", "eval")
    require_extra("train", only=["matplotlib"])  # for the figures at its end
    from megatron_tiedlora.study.sweep import sweep as run_sweep

    return run_sweep(command, scripts=scripts)


def plan(command: PlanCommand) -> int:
    """Find the fastest layouts for a cluster and print them. Return 0 if a layout fits, else 1.

    With --measure, only the constants of this machine are measured."""
    settings = command.settings
    if settings.measure is not None:
        require_extra("train", only=["deepspeed"])
        return _measure(command, settings.measure)
    prints = settings.json_file == "-"
    given = {"--json": None if prints else settings.json_file, "--yaml": settings.yaml}
    paths = {flag: output_file(value, flag=flag) for flag, value in given.items() if value is not None}
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise UserError(f"--json and --yaml both write {settings.json_file}; give two files")
    gc.disable()  # a plan makes a million objects and frees few, so garbage collection would take half a second
    try:
        # These import torch, which takes a second. --help and a wrong flag do not wait for this import.
        from megatron_tiedlora.base.files import write_yaml
        from megatron_tiedlora.planning import cluster_report as report

        prepare_environment()
        found = report.plan_cluster(command)
        lines, chosen = report.report_lines(found, settings), report.chosen_layout(found, settings)
    finally:
        gc.enable()
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if "--json" in paths:
        write_json(paths["--json"], report.report_record(found, settings))
    if "--yaml" in paths and chosen is not None:
        write_yaml(paths["--yaml"], report.chosen_settings(found, chosen))
    show(*([json.dumps(report.report_record(found, settings))] if prints else lines))
    if warnings := report.warning_lines(found, settings):
        show(*warnings, file=sys.stderr)
    return 0 if found.rows else 1


def _measure(command: PlanCommand, file: str) -> int:
    """Measure this machine on all ranks. Rank 0 writes the result to `file`, or prints the result if `file` is `-`."""
    path = None if file == "-" else output_file(file, flag="--measure")  # checked before a minute of work
    prepare_environment()
    rank, world_size = rank_and_world_size()
    from megatron_tiedlora.checkpoint.sources import find_model
    from megatron_tiedlora.runtime.process_group import join_process_group, leave_process_group
    from megatron_tiedlora.selfcheck.machine_constants import measure_machine

    source = find_model(command.train.model, weights=False)
    device = join_process_group(_MEETING_MINUTES, expected_ranks=world_size)
    machine = measure_machine(source, device, seconds=command.settings.measure_seconds)
    if rank == 0 and path is None:
        show(json.dumps(machine.record()))
    elif rank == 0 and path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, machine.record())
        show(*machine.lines(), f"{path}: constants of {machine.title}, for --constants")
    leave_process_group()
    return 0


def doctor(settings: DoctorSettings) -> int:
    """Check the hosts of a job and print the report. Return 0 if a job can start, else 1."""
    from megatron_tiedlora.cluster.doctor import examine, report_text

    require_extra("train", only=["deepspeed"])
    file = _json_path(settings.json_file)
    if file is not None and not file.absolute().parent.is_dir():
        raise UserError(
            f"--json {settings.json_file}: its folder does not exist; create the folder or give a different file"
        )
    report = examine(settings, os.environ, lambda line: show(line, file=sys.stderr))
    text = json.dumps(report.model_dump(mode="json"), indent=2)
    print(text if settings.json_file == "-" else report_text(report))
    if file is not None:
        write_text(file, f"{text}\n")
    return 0 if report.verdict == "ready" else 1


def _json_path(given: str | None) -> Path | None:
    return None if given in (None, "-") else user_path(str(given), flag="--json")


def env(settings: EnvSettings) -> int:
    """Print a description of this machine for a bug report, as a table or as JSON. Return the exit status."""
    file = _json_path(settings.json_file)
    machine = machine_record()
    text = machine.model_dump_json(indent=2)
    if file is not None:
        write_text(file, f"{text}\n")
    if settings.json_file == "-":
        show(*text.split("\n"))
        return 0
    sections = in_words(machine)
    rows = [(name, value) for section in sections.values() for name, value in section.items()]
    lines = iter(aligned_lines(rows, align="<", indent="  "))
    for number, (title, section) in enumerate(sections.items()):
        show(*([""] if number else []), title, *(next(lines) for _ in section))
    return 0


def recipes(settings: tool_settings.RecipesSettings) -> int:
    """Write the files of `recipes/` into a folder, without replacing files there. Return 1 if one existed, else 0."""
    with os_errors(f"{settings.folder}: cannot be written"):
        settings.folder.mkdir(parents=True, exist_ok=True)
        kept = 0
        for source in sorted((PACKAGE_FOLDER / "recipes").iterdir()):
            file = settings.folder / source.name
            if not file.exists():
                write_text(file, source.read_text(encoding="utf-8"))
                show(f"wrote      {file}")
            elif file.read_bytes() != source.read_bytes():
                show(f"kept       {file}, which differs from the recipe; remove it to get the recipe")
                kept = 1
    return kept


def bench(settings: BenchSettings) -> int:
    """Measure a training step, generation or serving and print the result on rank 0. Return the exit status."""
    require_vllm("--what serving") if settings.what == "serving" else require_extra("train", only=["deepspeed"])
    file = None if settings.json_file is None else user_path(settings.json_file, flag="--json")
    prepare_environment()
    rank, world_size = rank_and_world_size()
    what = settings.measured_on(world_size)
    # These import DeepSpeed and transformers, which takes seconds. A wrong path does not wait for them.
    from megatron_tiedlora.parallel.agreement import decided_by_rank_0
    from megatron_tiedlora.runtime.process_group import leave_process_group
    from megatron_tiedlora.runtime.stopping import RunStopped
    from megatron_tiedlora.selfcheck import compare, serving_bench, step_bench
    from megatron_tiedlora.selfcheck.bench_report import report_lines

    planned = None
    try:
        if what == "layout":
            found, planned = step_bench.measure_layout(settings, rank=rank, world_size=world_size)
        else:
            found = (serving_bench.measure_serving if what == "serving" else compare.measure_sides)(settings)
    except RunStopped as stop:
        return stop.status

    def publish() -> None:
        assert found is not None, "rank 0 has the report"
        show(*report_lines(found, planned))
        if file is not None:
            write_json(file, found)

    decided_by_rank_0(publish)
    leave_process_group()
    return 0


def check_gpu(settings: CheckGpuSettings) -> int:
    """Run the tests in `selfcheck/`, each part in its own process, write the reports and return the exit status. A
    signal also ends the running check process. Raise UserError if the folder of the reports cannot be written."""
    from xml.etree.ElementTree import Element

    import torch

    from megatron_tiedlora.selfcheck import parts

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # for example under nohup
            # SystemExit also ends the running check process, before this process exits.
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    require_extra("check")
    chosen, missing, num_gpus = settings.parts, None, 0
    if settings.device == "cuda":
        missing, num_gpus = parts.why_no_gpu(), torch.cuda.device_count()
        chosen = chosen if missing is None else ("env",)
    limits = part_limits(chosen, settings.seconds, num_gpus=num_gpus)
    where = f"{num_gpus} GPUs of {socket.gethostname()}" if settings.device == "cuda" else settings.device
    total, now = sum(limit.seconds for limit in limits.values()), time.strftime("%Y-%m-%d %H:%M:%S %z")
    folder, suites, left_out = settings.output.absolute(), list[Element](), list[str]()

    def write(*unfinished: Element) -> None:
        found = [*suites, *unfinished]
        title = f"{settings.model} on {where}; at most {total:.0f} seconds from {now}"
        without = [f"Left out for lack of time: {', '.join(left_out)} (give --parts, or more --seconds).", ""]
        lines = (*parts.summary_lines(found), *(line for suite in found for line in parts.part_lines(suite)))
        page = ("# check-gpu", "", title, "", *(without if left_out else ()), *lines)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            parts.write_reports(folder, page, found)
        except OSError as error:
            said = f"--output {settings.output}: {error.strerror or error}; give a writable folder"
            raise UserError(said) from None

    write()
    deadline = time.monotonic()
    for part, limit in limits.items():
        deadline += limit.seconds
        left = deadline - time.monotonic()
        if left < limit.least:
            left_out.append(part)
            continue
        given = {"device": settings.device, "model": settings.model, "folder": folder, "seconds": left}
        options = [f"--check-{name}={value}" for name, value in {**given, "long": int(limit.is_long)}.items()]
        command = parts.part_command(part, *options, f"--junitxml={folder / f'{part}.xml'}")
        environment = parts.part_environment(part, settings.device)
        suites.append(parts.run_part(part, command, environment=environment, folder=folder, seconds=left, shows=write))
        show(*parts.part_lines(suites[-1]))
        write()
    write()
    show("", *parts.summary_lines(suites), f"{settings.output}/report.md; to mail: {settings.output}/report.zip")
    if missing is not None:
        show(f"no GPU, so only env was run: {missing}", file=sys.stderr)
        return NO_GPU_STATUS
    return int(parts.verdicts(suites)["failed"] > 0)


class PartLimit(NamedTuple):
    """A part's share of the time of check-gpu, to which it may add what earlier parts have left; the least seconds
    without which it is left out; and whether its long form runs."""

    seconds: float
    least: float
    is_long: bool


def part_limits(given: Sequence[str] | None, seconds: float | None, *, num_gpus: int) -> dict[str, PartLimit]:
    """Return the time of each part, in the order in which the parts run.

    All `given` parts run. If None are given, parts that fit into `seconds` run, and others run at the end if time is
    left. As many as possible run in their long form. What remains is divided in proportion to the needs."""
    several = num_gpus > 1
    needs = {**CHECK_PARTS, "ranks": RANKS_OF_SEVERAL} if several else CHECK_PARTS
    order = [part for part in needs if given is None or part in given]
    if several and "ranks" in order:  # needs its GPUs most; it comes after `speed` and what comes before that
        before = sum(part in order for part in list(needs)[: list(needs).index("speed") + 1])
        order.insert(before, order.pop())
    total = seconds or (CHECK_SECONDS_OF_SEVERAL if several else CHECK_SECONDS)
    chosen: dict[str, int] = {}
    for part in order:
        if given is not None or not chosen or sum(chosen.values()) + needs[part][0] <= total:
            chosen[part] = needs[part][0]
    for part, need in list(chosen.items()):
        if sum(chosen.values()) - need + needs[part][1] <= total:
            chosen[part] = needs[part][1]
    scale = total / sum(chosen.values())
    limits = {part: PartLimit(scale * need, 0.0, need == needs[part][1]) for part, need in chosen.items()}
    return limits | {part: PartLimit(0.0, needs[part][0], False) for part in order if part not in chosen}


def index(settings: IndexSettings) -> int:
    """Build, change, search or check the index of adapters. Return the exit status."""
    from megatron_tiedlora.convert.index import INDEX_FILE, entry_folder, find_entry, read_index  # needs sqlite3

    root = settings.folder
    if settings.action in ("find", "alias", "tag", "lineage"):
        for line in _index_lines(settings):
            show(line)
        return 0
    # Only actions that read adapters import torch, which takes seconds.
    from megatron_tiedlora.convert.collection import build_index, compare_adapters, verify_entries
    from megatron_tiedlora.convert.serving import serve_command
    from megatron_tiedlora.convert.unused import collect_unused

    match settings.action:
        case "build":
            count, problems = build_index(root)
            indexed = f"indexed {count_text(count, 'adapter')}: {root / INDEX_FILE}"
            show(*(f"FAILED  {problem}" for problem in problems), indexed)
            if bases := {entry.base_model for entry in read_index(root).entries}:
                show(f"serve them with: {serve_command(bases.pop() if len(bases) == 1 else 'M', root)}")
            return 1 if problems else 0
        case "verify":
            entries = [entry for entry, _ in read_index(root).matching(settings.wanted)]
            problems = verify_entries(root, entries)
            size = messages.bytes_in_words(sum(entry.size for entry in entries))
            verified = f"verified {count_text(len(entries), 'adapter')} of {size}: {len(problems)} with problems"
            show(*(f"FAILED  {problem}" for problem in problems), verified)
            return 1 if problems else 0
        case "gc":
            found, kept = collect_unused(root, delete=settings.delete)
            what = "deleted" if settings.delete else "not needed; delete them with --delete"
            sizes = (f"{messages.bytes_in_words(size):>8}  {folder}" for folder, size in found.items())
            total = messages.bytes_in_words(sum(found.values()))
            show(*(f"kept: {line}" for line in kept), *sizes, f"{count_text(len(found), 'folder')} of {total} {what}")
            return 1 if settings.delete and kept else 0
    one, other = (entry_folder(root, find_entry(root, name)) for name in settings.adapters)
    differences = compare_adapters(one, other)
    show(*(differences or ["the same"]))
    return 1 if differences else 0


def _index_lines(settings: IndexSettings) -> Iterator[str]:
    """Yield what an action on the index prints that reads no adapter. Change aliases and tags."""
    from megatron_tiedlora.convert.index import changed_index, find_entry, read_index

    root, words, removes = settings.folder, settings.adapters, settings.remove
    if settings.action == "find":
        found, table = read_index(root).matching(settings.wanted), list[tuple[str, ...]]([_HEADING])
        for entry, labels in found:
            names = (entry.name, last_name(entry.base_model), entry.method, str(entry.rank), entry.targets)
            own = (", ".join(values) or "-" for values in labels.values())
            table.append((*names, f"{entry.parameters:,}", entry.task or "-", entry.date, *own, entry.path))
        as_json = (json.dumps({**asdict(entry), **labels}) for entry, labels in found)
        as_table = [*aligned_lines(table, align="<"), "", count_text(len(found), "adapter")]
        yield from as_json if settings.as_json else as_table
    elif settings.action == "lineage":
        content = read_index(root)
        entry, rows = find_entry(root, words[0], content), list[tuple[str, ...]]()
        for step, holders in content.lineage(entry):
            paths = ", ".join(holder.path for holder in holders) or f"{step.init_from} (not in the index)"
            rows.append(("started from", paths, step.init_sha256 or "unknown"))
        for other in content.entries:
            if other.init_sha256 in entry.held and other.path != entry.path:
                rows.append(("was the start of", other.path, other.sha256))
        base = f"config {entry.base_hash}, weights {entry.weights_hash or 'unknown'}"
        rows = [("adapter", entry.path, entry.sha256), *rows, ("base", entry.base_model, base)]
        yield from aligned_lines([*rows, ("data", entry.data or "not recorded")], align="<")
    elif settings.action == "tag":
        with changed_index(root) as content:
            entry = find_entry(root, words[0], content)
            pairs = {(entry.path, tag) for tag in words[1:]}
            content.tags = content.tags - pairs if removes else content.tags | pairs
        yield f"{entry.path}: {', '.join(sorted(tag for path, tag in content.tags if path == entry.path)) or 'no tag'}"
    else:
        with changed_index(root) as content:
            before, said = content.aliases.pop(words[0], None), f"{root}: alias {words[0]}"
            if before is None and removes:
                raise UserError(f"{said} does not exist; list all with `find --alias '*'`")
            if not removes and (os.path.lexists(root / words[0]) or content.named(words[0])):
                raise UserError(f"{said} is also the name of an adapter or a folder there; give another name")
            if not removes:
                content.aliases[words[0]] = find_entry(root, words[1], content).path
        yield f"{words[0]}: {content.aliases.get(words[0], 'removed')}{f' (before: {before})' if before else ''}"
        if before:
            yield f"servers that already have {words[0]} loaded serve {before} under this name until they restart"


def push(settings: PushSettings) -> int:
    """Publish an adapter on the Hugging Face hub. Return the exit status."""
    from megatron_tiedlora.integrations.push import check_hub_id, upload, write_published

    check_hub_id(settings.repo, flag="--repo", owned=True)
    if settings.base_name is not None:
        check_hub_id(settings.base_name, flag="--base_name")
    if settings.output is not None:
        reject_existing(settings.output, flag=f"--output {settings.output}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.output or Path(temporary) / "published"
        write_published(settings, folder, say=lambda note: show(f"note: {note}"))
        if settings.dry_run:
            show(f"wrote the files for {settings.repo} without publishing them: {folder}")
            return 0
        show(f"published: {upload(folder, settings.repo, private=settings.private)}")
    return 0
