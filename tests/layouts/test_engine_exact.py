"""Every method, trained through the DeepSpeed engine, against the dense oracle; then DP = 2 at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_runs import (
    EngineRun,
    oracle_run,
    relative_distance,
    relative_errors,
    run_engine,
    save_start,
    write_uneven_data,
)
from oracle import OracleConfig
from oracle_training import OracleRun
from tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.engine.engine_json import find_engine_json

STEPS, FEWER = 20, 6
# Two exact fp32 runs drift by 2e-7 in the loss over 20 AdamW steps; adapters are compared by norms for the same reason.
LOSS_TOLERANCE = 1e-6
NORM_TOLERANCE = 1e-5
ADAPTER_TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a tiny GQA model on uneven data, clipping active at every step."""
    folder = tmp_path_factory.mktemp("base")
    model = write_tiny_model(folder / "model", num_layers=3)
    train = write_uneven_data(folder / "train.jsonl")
    return {
        "model": str(model),
        "train_file": str(train),
        "validation_file": str(write_uneven_data(folder / "validation.jsonl", rows=4, seed=1)),
        "dtype": "fp32",
        "rank": 4,
        "alpha": 6.0,
        "seed": 11,
        "max_length": 128,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": STEPS,
        "warmup_steps": 4,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "gradient_clipping": 0.05,
        "eval_interval": 1000,
    }


def case(base: dict[str, Any], folder: Path, name: str, **changes: Any) -> tuple[dict[str, Any], OracleRun]:
    """A worker's case that starts from random non-zero factors, and the oracle's run of it."""
    settings = {**base, **changes}
    layers = settings.get("layers")
    start = random_adapter(
        settings.get("method", "tl6"),
        OracleConfig.from_folder(Path(base["model"])),
        rank=settings["rank"],
        alpha=settings["alpha"],
        layers=tuple(layers) if layers else None,
        seed=3,
        scale=0.2,
    )
    file = save_start(start, folder / f"{name}.safetensors")
    return {"settings": settings, "start": str(file)}, oracle_run(settings, start)


def check(run: EngineRun, oracle: OracleRun, *, loss: float, norm: float = NORM_TOLERANCE) -> None:
    assert max(relative_errors(run.losses, oracle.losses)) <= loss
    assert max(relative_errors(run.grad_norms, oracle.grad_norms)) <= norm
    assert min(oracle.grad_norms) > 0.05, "clipping must be active"
    assert run.learning_rates == pytest.approx(oracle.learning_rates, rel=1e-12)
    for name in oracle.adapter.trained:
        assert relative_distance(run.adapter[name], oracle.adapter.tensors[name]) <= ADAPTER_TOLERANCE, name


@pytest.mark.distributed
def test_methods_equal_the_oracle(base: dict[str, Any], tmp_path: Path, whole: bool) -> None:
    """All eight methods and single-layer LoRA, AdamW steps in fp32 under ZeRO-2: 20, or in part 20 of two methods.

    What adds up over many steps does so in the optimizer, which knows no method.
    """
    steps = {method: STEPS if whole or method in ("lora", "tl6") else FEWER for method in METHODS}
    prepared = [case(base, tmp_path, method, method=method, max_steps=steps[method]) for method in METHODS]
    prepared.append(case(base, tmp_path, "one_layer", method="lora", layers=[2], max_steps=FEWER))
    runs = run_engine([item[0] for item in prepared], tmp_path, ranks=1)
    for (_, oracle), run in zip(prepared, runs, strict=True):
        check(run, oracle, loss=LOSS_TOLERANCE)


@pytest.mark.distributed
def test_two_ranks_at_every_zero_stage(base: dict[str, Any], tmp_path: Path) -> None:
    """DP = 2 under ZeRO 0 to 3 and offload, 1 or 4 samples a micro-batch; rank 3 makes sizes that do not divide."""
    changes = {"rank": 3, "packing": False, "max_steps": FEWER}
    # Tensors as small as these are never partitioned under ZeRO-3 unless its threshold for keeping them is 0.
    small = json.loads(find_engine_json("zero3.json").read_text())
    small["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    partitioned = tmp_path / "partitioned.json"
    partitioned.write_text(json.dumps(small))
    prepared = [
        case(base, tmp_path, f"{Path(ds_config).name}-{micro}", ds_config=ds_config, micro_batch_size=micro, **changes)
        for ds_config, micro in (
            ("zero0.json", 1),
            ("zero1.json", 4),
            ("zero2.json", 1),
            ("zero3.json", 4),
            (str(partitioned), 1),
            ("zero2_offload.json", 2),
        )
    ]
    runs = run_engine([item[0] for item in prepared], tmp_path, ranks=2)
    for (_, oracle), run in zip(prepared, runs, strict=True):
        check(run, oracle, loss=1e-5)


@pytest.mark.distributed
def test_packed_rows_at_every_zero_stage(base: dict[str, Any], tmp_path: Path) -> None:
    """DP = 2, several samples a row: steps of two to four micro-batches a rank, and the unpacked run's numbers."""
    changes = {"micro_batch_size": 1, "packing": True, "max_steps": FEWER}
    prepared = [
        case(base, tmp_path, f"packed-{ds_config}", ds_config=ds_config, **changes)
        for ds_config in ("zero0.json", "zero1.json", "zero2.json", "zero3.json", "zero2_offload.json")
    ]
    runs = run_engine([item[0] for item in prepared], tmp_path, ranks=2)
    for (_, oracle), run in zip(prepared, runs, strict=True):
        check(run, oracle, loss=1e-5)


@pytest.mark.distributed
def test_splits_of_the_global_batch(base: dict[str, Any], tmp_path: Path) -> None:
    """One rank: the whole batch at once, sample by sample, and with recompute give the same run."""
    prepared = [
        case(base, tmp_path, f"split{index}", packing=False, max_steps=FEWER, **changes)
        for index, changes in enumerate(
            (
                {"micro_batch_size": 8, "ds_config": "zero0.json"},
                {"micro_batch_size": 1, "ds_config": "zero1.json"},
                {"micro_batch_size": 4, "ds_config": "zero3.json", "recompute": "full"},
                {"micro_batch_size": 2, "ds_config": "zero3.json", "recompute": "selective"},
            )
        )
    ]
    runs = run_engine([item[0] for item in prepared], tmp_path, ranks=1)
    for (_, oracle), run in zip(prepared, runs, strict=True):
        check(run, oracle, loss=1e-5)
