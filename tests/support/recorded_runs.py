"""Records the bits of many runs, to show that a change of the code's structure has changed no number.

    PYTHONPATH=tests python -m support.recorded_runs --output before.json            about 15 minutes on two cores
    PYTHONPATH=tests python -m support.recorded_runs --output after.json --against before.json
    PYTHONPATH=tests python -m support.recorded_runs --output demo.json --cases demo      names, or parts of them

A case is one or more starts of `train` (or `sweep`) by their flags, so that it needs nothing of the package but its
command line. Of its folder are recorded: the sha256 of every tensor of adapters, exports and checkpoints (with the
optimizer's), every number of metrics.jsonl that is not a time, results, tables and run_status.json; of each rank, the
messages and bytes of every collective of torch.distributed, which are counted where torch is called.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.folders import ROOT
from support.run_helpers import FOUR, LAUNCHER_VARIABLES, Base, run_ranks, start_ranks, write_adapters, write_base

_TIMES = {"tokens_per_second", "supervised_tokens_per_second", "mfu", "peak_memory_bytes", "seconds", "time", "reason"}
_PLACES = {"output_dir", "resume", "config_sha256", "adapters", "folder", "model", "train_file", "validation_file"}
_PLACES |= {"test_file", "adapter"}
LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1), (1, 4, 1), (2, 2, 2))
_COUNTED = (
    *("all_reduce", "broadcast", "send", "recv", "isend", "irecv", "reduce", "gather", "barrier"),
    *("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_gather", "reduce_scatter"),
)
SICK = {"learning_rate": 1e9, "gradient_clipping": 0.0, "warmup_steps": 0, "max_steps": 6, "method": "tl5"}

Start = tuple[dict[str, Any], int, int]  # changed settings, ranks, exit status


def count_messages() -> None:
    """Runs in a rank before the script: at its end it writes how often each collective was called, and with how many
    bytes, to messages.START.RANK.json in its folder."""
    from multiprocessing.util import Finalize

    import torch.distributed as dist

    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, torch.Tensor)]
            counts[f"{name} messages"] += 1
            counts[f"{name} bytes"] += sum(tensor.nbytes for tensor in tensors)
            return function(*arguments, **keywords)

        return call

    for name in _COUNTED:
        setattr(dist, name, counted(name, getattr(dist, name)))
    rank = os.environ.get("RANK", "0")
    number = len(list(Path.cwd().glob(f"messages.*.{rank}.json")))
    file = Path.cwd() / f"messages.{number}.{rank}.json"
    Finalize(None, lambda: file.write_text(json.dumps(dict(sorted(counts.items())))), exitpriority=1)


def cases() -> dict[str, list[Start]]:
    """Name -> starts, one after another in the same run folder."""
    found: dict[str, list[Start]] = {}
    kinds: dict[str, dict[str, Any]] = {
        "tl6": {"method": "tl6", "dropout": 0.1},
        "tl6-all": {"method": "tl6", "targets": "all", "packing": True},
        "lora-all": {"method": "lora", "targets": "all"},
        "vera-all": {"method": "vera", "targets": "all", "rank": 5},
        "nf4": {"method": "tl6", "base": "nf4", "dtype": "bf16", "targets": "all"},
    }
    for tp, pp, dp in LAYOUTS:
        sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "micro_batch_size": 2 if dp == 1 else 1}
        for kind, own in kinds.items():
            engine = "zero1.json" if pp > 1 or dp == 1 else "zero2.json"
            steps = {"max_steps": 4, "eval_interval": 2, "ds_config": engine}
            found[f"{tp}x{pp}x{dp} {kind}"] = [({**sizes, **own, **steps}, tp * pp * dp, 0)]
    for tp, pp, dp in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)):
        sizes = {"tensor_parallel": tp, "pipeline_parallel": pp, "micro_batch_size": 1, "gradient_clipping": 0.01}
        unsharded = {"ds_config": "zero0.json", "method": "tl6", "targets": "all", "dropout": 0.1, "max_steps": 4}
        found[f"zero0 {tp}x{pp}x{dp}"] = [({**sizes, **unsharded, "eval_interval": 2}, tp * pp * dp, 0)]
    resumed = {"method": "tl6", "targets": "all", "save_interval": 2, "dropout": 0.1, "schedule": "constant"}
    found["resume"] = [({**resumed, "max_steps": 3}, 1, 0), ({**resumed, "max_steps": 6, "resume": "auto"}, 1, 0)]
    found["resume 2x1x1 to 1x2x1"] = [
        ({**resumed, "max_steps": 3, "tensor_parallel": 2, "ds_config": "zero1.json"}, 2, 0),
        ({**resumed, "max_steps": 6, "pipeline_parallel": 2, "resume": "auto", "ds_config": "zero1.json"}, 2, 0),
    ]
    for name, sizes, ranks in (("", {}, 1), (" tp", {"tensor_parallel": 2}, 2), (" pp", {"pipeline_parallel": 2}, 2)):
        scored = {"test_file": "{validation}", "max_new_tokens": 8}
        four = {**FOUR, "b": {**FOUR["b"], **scored}}
        found[f"four{name}"] = [({**sizes, "adapters": four}, ranks, 0)]
        found[f"four, one fails{name}"] = [({**sizes, "adapters": {"sick": SICK, **FOUR}}, ranks, 1)]
    found["zero3"] = [({"ds_config": "zero3.json", "max_steps": 4}, 2, 0)]
    return found


def start(base: Base, folder: Path, changes: dict[str, Any], ranks: int, status: int) -> None:
    """One start of train.py in `folder`, counted."""
    changes = dict(changes)
    if entries := changes.pop("adapters", None):
        text = json.dumps(entries).replace("{validation}", str(base.validation))
        changes["adapters"] = write_adapters(folder.parent / "adapters.yaml", json.loads(text))
    arguments = base.arguments(output_dir=folder, **changes)
    run_ranks(arguments, folder=folder.parent, cache=base.cache, ranks=ranks, prelude=count_messages).expect(status)


def start_demo(_: Path, folder: Path) -> None:
    """The demo, of which 20 steps; `tiedlora prepare-demo` must have been run."""
    arguments = ["--ds_config=zero2.json", f"--output_dir={folder}", "--dtype=fp32", "--max_steps=20"]
    arguments += ["--eval_metric=loss", "--max_new_tokens=8", "--global_batch_size=8"]  # else it takes half an hour
    cache = Path.home() / ".cache" / "megatron_tiedlora"
    world = start_ranks(arguments, folder=folder.parent, cache=cache, ranks=1, prelude=count_messages)
    world._deadline += 1800  # it takes minutes
    world.wait().expect(0)


def start_sweep(base_folder: Path, folder: Path) -> None:
    """A grid of two methods, two ranks and two learning rates, trained together."""
    from support.sweep_runs import study_arguments, write_study_base

    base, test = write_study_base(base_folder)
    arguments = study_arguments(base, test, folder, together="auto", max_steps=8)
    run_ranks(arguments, folder=folder.parent, cache=base.cache, script=ROOT / "launch" / "sweep.py").expect(0)


OTHERS = {"demo": start_demo, "sweep": start_sweep}


def tensors(file: Path) -> dict[str, str]:
    """Name -> sha256 of each tensor of a file."""
    found = {}
    for name, tensor in load_file(file).items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + raw).hexdigest()[:24]
    return found


def _without(content: Any) -> Any:
    """JSON without times and places."""
    if isinstance(content, dict):
        return {key: _without(value) for key, value in content.items() if key not in _TIMES | _PLACES}
    return [_without(value) for value in content] if isinstance(content, list) else content


def recorded(folder: Path) -> dict[str, Any]:
    """File -> what is compared of it."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = tensors(file)
        elif file.name == "metrics.jsonl":
            found[name] = [_without(json.loads(line)) for line in file.read_text().splitlines()]
        elif file.name in ("run_status.json", "scores.json", "results.json") or file.name.startswith("messages."):
            found[name] = _without(json.loads(file.read_text()))
        elif file.name in ("table2.csv", "table3.csv", "predictions.jsonl"):
            text = file.read_text().replace(str(folder), "")
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:24]
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each file of a case that both tables have and that differs, or that one of them lacks."""
    lines = []
    for case in sorted(before.keys() & after.keys()):
        for file in sorted(before[case].keys() | after[case].keys()):
            old, new = before[case].get(file), after[case].get(file)
            if old != new:
                what = "only before" if new is None else "only after" if old is None else "differs"
                lines.append(f"{case}: {file}: {what}")
    return lines


def main() -> int:
    """Record, and compare. Exit status 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the table, as JSON")
    parser.add_argument("--against", type=Path, help="an earlier table")
    parser.add_argument("--cases", default="", help="parts of names, with commas; default: all")
    options = parser.parse_args()
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    wanted, table = [part for part in options.cases.split(",") if part], {}
    with tempfile.TemporaryDirectory() as temporary:
        base = write_base(Path(temporary) / "base", num_layers=5, num_heads=8, num_kv_heads=4, head_dim=8)
        for name, starts in [*cases().items(), *((other, []) for other in OTHERS)]:
            if wanted and not any(part in name for part in wanted):
                continue
            print(name, flush=True)
            work = Path(temporary) / "work"
            work.mkdir()
            if name in OTHERS:
                OTHERS[name](work / "base", work / "run")
            for changes, ranks, status in starts:
                start(base, work / "run", changes, ranks, status)
            table[name] = recorded(work)
            shutil.rmtree(work)
            options.output.write_text(json.dumps(table, indent=1, sort_keys=True))
    if options.against is None:
        return 0
    lines = differences(json.loads(options.against.read_text()), table)
    print("\n".join(lines) or f"{len(table)} cases are equal")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
