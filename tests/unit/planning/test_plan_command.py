"""`tiedlora plan`: the table, the arithmetic of a row, JSON, the command and the YAML of a run, and docs/guide.md."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.document_rows import GUIDE, words_of
from support.folders import ROOT
from support.planned import H100, stage_table

from megatron_tiedlora.base.messages import UserError, bytes_in_words
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import FORMAT_NAMES, parse_plan
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.planning.cluster_report import plan_cluster
from megatron_tiedlora.planning.machines import CONSTANTS, GPUS, read_machine
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.planning.step_time import Links

# What the command may take for 128 nodes, in seconds of an idle core; about 4 of them are traces. Processes that share
# caches and clock with others take up to twice as many; the rest is for modules that are compiled anew in each process.
SECONDS, ALLOWANCE = 15.0, 2.5


SMALL = ("--model=llama2-7b", "--gpus_per_node=1", "--global_batch_size=8", "--formats=none")


@dataclass(frozen=True)
class Printed:
    """What a plan has printed and written."""

    text: str
    record: dict[str, Any]
    values: Path
    status: int

    def rows(self) -> list[list[str]]:
        """The words of each row of the table."""
        return [line.split() for line in self.text.splitlines() if re.match(r"  t\d+p\d+d\d+-[^\s:]+ +\d", line)]


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> Printed:
    """Run the command in this process."""
    status = call("plan", [*flags, f"--json={folder / 'plan.json'}", f"--yaml={folder / 'plan.yaml'}"])
    record = json.loads((folder / "plan.json").read_text())
    return Printed(capsys.readouterr().out, record, folder / "plan.yaml", status)


@pytest.mark.cpu_seconds(20, reason="a plan of a 70B model for 1,024 cards, of 178 traces")
def test_large_clusters_take_seconds() -> None:
    """In a process of its own, whose seconds of a processor are counted, since others wait for the same cores."""
    words = ["--model", "llama2-70b", "--nodes", "128", "--gpus_per_node", "8", "--gpu", "h100"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "megatron_tiedlora", "plan", *words]
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.1f} s of a processor")
    assert seconds < ALLOWANCE * SECONDS


@pytest.mark.cpu_seconds(15, reason="two plans of a 70B model for 32 cards")
def test_70b_on_32_h100_is_data_parallel_over_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16 and of all formats the fastest layout has copies of the model on several nodes; none spans one."""
    for formats in ("none", "none,nf4,fp8-products"):
        found = planned(tmp_path, capsys, "--model=llama2-70b", "--nodes=4", f"--formats={formats}", "--top=0")
        best = found.record["layouts"][0]
        layout = plan_run(
            parse_settings([f"--config={found.values}", "--dry_run", "--gpu=h100", "--world_size=32"], Settings),
            rank=0,
            world_size=32,
            weights=False,
        ).layout
        assert found.rows()[0][0] == best["layout"] and layout.dp_size == best["data_parallel"] > 1
        links = Links(layout, 8).by_group
        assert links["data"].num_nodes > 1 and links["tensor"].num_nodes == 1
        rates = [float(row[2].replace(",", "")) for row in found.rows()]
        assert rates == sorted(rates, reverse=True) and len(rates) > 15
        first = [int(word.replace(",", "")) for word in re.findall(r"[\d,]*\d", found.text.splitlines()[0])]
        enumerated, refused, dropped, priced, fitting = first
        assert enumerated == refused + dropped + priced and 0 < fitting < priced and dropped > 0
        assert "left out, so assumed: --gpu h100, --max_length 4096, --global_batch_size 128" in found.text
    wide = [row for row in found.record["layouts"] if row["settings"]["tensor_parallel"] == 8 and row["fits"]]
    plain = next(row for row in wide if "base" not in row["settings"])
    assert 0.25 < plain["seconds"]["tensor"] / plain["seconds"]["step"] < 0.35
    assert "tensor messages take" in found.text and "x as fast" in found.text


def test_the_arithmetic_of_a_row_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Amount / rate of each line is its time, the passes and the rest are the step; bytes add up to the sum."""
    name = "t2p2d2-b1-zero1-selective"
    flags = ("--model=llama2-70b", "--formats=none", "--global_batch_size=16", f"--why={name}", f"--layout={name}")
    found = planned(tmp_path, capsys, *flags)
    text = found.text[found.text.index(f"\n{name}: 8 micro-batches of up to 1 x 4,096 tokens per rank and step") :]
    assert "layout: 8 ranks = tensor 2, sequence parallelism x pipeline 2 x data 2, 80 layers" in text
    scales = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
    units = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
    amount = r"([\d.,]+) ([PTGMk]?)(?:FLOP|B)"
    fixed = r"(?: \+ ([\d.]+) (s|ms|us))?"
    terms = re.findall(rf"^ +([\d.]+) (s|ms|us)  .*: {amount} / {amount}/s{fixed}$", text, re.MULTILINE)
    assert len(terms) > 12
    for seconds, unit, size, scale, rate, of_rate, more, of_more in terms:
        value = float(size.replace(",", "")) * scales[scale] / (float(rate.replace(",", "")) * scales[of_rate])
        value += float(more) * units[of_more] if more else 0.0
        assert float(seconds) * units[unit] == pytest.approx(value, rel=0.02)
    record = next(row for row in found.record["layouts"] if row["layout"] == name)
    spent = record["seconds"]
    assert sum(value for key, value in spent.items() if key != "step") == pytest.approx(spent["step"])
    passes = sum(float(t[0]) * units[t[1]] for t in re.findall(r"^    +([\d.]+) (s|ms|us)  ", text, re.MULTILINE))
    assert passes > 0
    held = record["bytes"]
    parts = [size for key, size in held.items() if key not in ("needed", "of", "stage")]
    assert sum(parts) == pytest.approx(held["needed"])
    assert stage_table(text, "bytes per rank")[held["stage"]]["sum"] == bytes_in_words(held["needed"])
    assert f"h100: the fullest rank needs {bytes_in_words(held['needed'])} of 84.93 GB: it fits" in text
    assert f"tokens/s of each rank, MFU {record['mfu']:.1%}\n" in text
    assert len(stage_table(text, "messages and bytes")) == 2
    assert "recomputed: " in text and "waiting: the schedule of 2 stages and 8 micro-batches, simulated" in text


def test_what_does_not_fit_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, capsys, *SMALL, "--ds_config=zero1.json", "--why=t1p1d1-b8-zero1")
    sizes = r"1\d\d\.\d of 84\.9 GB, activations \d+\.\d, base 13\.\d"
    assert re.search(rf"t1p1d1-b8-zero1: {sizes}; --recompute selective fits", found.text)
    nothing = planned(tmp_path, capsys, "--model=llama2-70b", "--gpus_per_node=1", "--formats=none", "--nodes=1")
    assert nothing.status == 1 and nothing.rows() == []
    assert "138.0 of 84.9 GB for the weights alone; nothing fits with these parallel sizes" in nothing.text


def test_the_table_says_what_would_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the layout that a run has by default: recompute is named before ZeRO, and another storage last."""
    found = planned(tmp_path, capsys, *SMALL[:-1], "--formats=none,nf4", "--micro_batch_size=8")
    missed = found.text[found.text.index("does not fit") :].split("\n\n")[0].splitlines()[1:]
    names = [line.split(": ")[0].strip() for line in missed]
    assert sorted(names) == ["t1p1d1-b8-zero2", "t1p1d1-b8-zero2-nf4"]
    assert all(line.endswith("; --recompute selective fits") for line in missed)
    large = planned(tmp_path, capsys, "--model=llama2-70b", "--gpus_per_node=1", "--formats=none,nf4")
    words = r"138.0 of 84.9 GB for the weights alone; (--recompute \w+ )?--base nf4 fits"
    assert re.search(rf"\n  t1p1d1-b2-zero2: {words}\n", large.text)


def test_a_layout_that_does_not_fit_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, as is a YAML that could not be written."""
    assert call("plan", [*SMALL, "--layout=t1p1d1-b8-zero1"]) == 0
    words = capsys.readouterr().err
    assert re.match(r"warning: --layout does not fit: t1p1d1-b8-zero1: \d+\.\d of 84.9 GB, .* fits\n$", words)
    file = tmp_path / "p.yaml"
    assert call("plan", ["--model=llama2-70b", "--gpus_per_node=1", "--formats=none", f"--yaml={file}"]) == 1
    assert capsys.readouterr().err == f"warning: --yaml {file} is not written, as no layout fits\n"
    assert not file.exists()


def test_json_is_printed_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """For `-`; other files are written into folders that are made for them."""
    assert call("plan", [*SMALL, "--json=-", f"--yaml={tmp_path / 'new' / 'p.yaml'}"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["model"] == "llama2-7b" and printed.err == ""
    assert call("plan", [*SMALL, f"--json={tmp_path / 'other' / 'p.json'}"]) == 0
    assert {path.name for path in tmp_path.glob("*/*")} == {"p.yaml", "p.json"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--json=file/p.json",), "--json file/p.json: file is a file; give a folder"),
        (("--yaml=file/p.yaml",), "--yaml file/p.yaml: file is a file; give a folder"),
        (("--yaml=.",), "--yaml .: is a folder; give a file"),
        (("--json=p", "--yaml=./p"), "--json and --yaml both write p; give two files"),
    ],
)
def test_wrong_files_are_found_before_planning(
    flags: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        call("plan", ["--model=nosuch", "--task=squad", *flags])


def test_a_command_has_the_flags_of_the_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --yaml the flags stand in the command, which `tiedlora train` accepts."""
    assert call("plan", ["--model=llama2-13b", "--global_batch_size=16", "--formats=none", "--seed=7"]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "tiedlora run" in line)
    words = line.split()
    assert words[words.index("--seed") + 1] == "7"
    flags = words[words.index("--model") :]
    settings = parse_settings([*flags, "--dry_run", "--gpu=h100", "--world_size=8"], Settings)
    assert plan_run(settings, rank=0, world_size=8, weights=False).layout.dp_size == 8


# docs/guide.md: its table is planned anew. tests/runs/test_document_commands.py checks and runs all its commands. -----

PLANS = {name: command for command in GUIDE.commands for name in re.findall(r"tiedlora plan .* --yaml (\S+)", command)}
FILES = re.findall(r"^\| (.*?) \| `([\w-]+\.yaml)` \|", GUIDE.text, re.MULTILINE)
ROWS = {Path(name).name: title for title, name in FILES}


@pytest.mark.parametrize("name", PLANS)
def test_the_table_is_what_its_commands_plan(name: str) -> None:
    """But for the data: every sample has the full length, and the model is a preset, so that no file is needed."""
    words = words_of(PLANS[name], {})[2:]
    for flag in ("--train_file", "--yaml"):
        del words[words.index(flag) : words.index(flag) + 2]
    words[words.index("--model") + 1] = Path(words[words.index("--model") + 1]).name
    row, file = plan_cluster(parse_plan(words)).rows[0], Path(name).name
    line = f"| {ROWS.get(file, '?')} | `{file}` | `{row.name}` | {row.needed / 1e9:.1f} | {row.tokens_per_second:,.0f}"
    line += f" | {row.hours:.2f} | {row.hours * row.layout.world_size:.1f} |"
    print(f"\n{line}")
    assert line in GUIDE.text


def test_the_words_about_70b_on_one_card_are_those_of_its_plans() -> None:
    """16 bits do not fit; 4 bits do without recompute, 8 bits only with full recompute."""
    flags = ["--model=llama2-70b", "--gpus_per_node=1", "--max_length=2048"]
    rows = {name: plan_cluster(parse_plan([*flags, f"--formats={name}"])).rows for name in FORMAT_NAMES}
    recomputes = {name: {row.layout.recompute for row in found} for name, found in rows.items()}
    assert not rows["none"] and "none" in recomputes["nf4"]
    assert all(recomputes[name] == {"full"} for name in ("int8", "fp8", "fp8-products"))
    assert not rows["fp8-transposed"]


def test_the_words_about_the_table_are_those_of_its_plans() -> None:
    assert {Path(name).name for name in PLANS} == set(ROWS) and len(ROWS) == 6
    train = parse_plan(PLANS["seven.yaml"].split()[2:]).train
    samples = train.max_steps * train.global_batch_size
    said = f"{train.global_batch_size} samples in a step and {train.max_steps} steps, so {samples:,} samples, here of"
    assert f"{said} {train.max_length:,} tokens" in " ".join(GUIDE.text.split())
    assert (train.method, train.rank) == ("tl6", 8) and "`tl6` at rank 8" in GUIDE.text
    assert f"({GPUS['h100']['memory'] / 1e9:.1f} GB as PyTorch counts)" in GUIDE.text


def test_kubernetes_takes_what_the_guide_says() -> None:
    _, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "trainjob.yaml").read_text())
    trainer = job["spec"]["trainer"]
    names = [word.partition("=")[0] for word in trainer["args"]]
    assert names == ["--model", "--train_file", "--output_dir", "--resume"]
    nodes = parse_plan(PLANS["/shared/sixteen.yaml"].split()[2:]).settings.nodes
    ranks = nodes * trainer["numProcPerNode"]
    assert f"Set `numNodes` to {nodes} (twice) and {ranks} expected ranks" in GUIDE.text


# Machines -----------------------------------------------------------------------------------------------------------


def test_a_file_of_constants_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(H100.record()))
    assert read_machine(file) == H100
    assert {name for name, constant in H100.constants.items() if not constant.source} == set()
    assert set(H100.constants) == set(CONSTANTS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"constants": None}, "this is not a file of constants. Write one with"),
        ({"memory": "80"}, r"memory is '80'. Give a number \(unit: bytes"),
        ({"memory": -1}, "memory is -1. Give a number"),
        ({"memory": 0}, "memory is 0. Give a value above 0"),
        ({"bandwith": 1.0}, "unknown constant 'bandwith' .did you mean bandwidth"),
        ({"message": None}, "message is None"),
        ({"memory": 10**400}, r"memory is an integer of 1329 bits. Give a number \(unit: bytes"),
        ({"matmul.bf16": 72}, "matmul.bf16 is 72. Give a fraction such as 0.8, not a percentage"),
        ({"peak.fp8": 0}, "peak.fp8 is 0. Give a value above 0 for a CPU, or a GPU of capability 8.9"),
        ({"capability": "9"}, "capability is '9'. Give two integers"),
        ({"capability": None}, "capability is missing. Give the GPU's CUDA compute capability"),
        ({"step": ...}, "step is missing"),
    ],
)
def test_a_wrong_file_of_constants_is_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    content = H100.record()
    for name, value in change.items():
        if value is ...:
            del content["constants"][name]
        elif name in content:
            content[name] = value
        else:
            content["constants"][name] = value
    file = tmp_path / "c.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_machine(file)
