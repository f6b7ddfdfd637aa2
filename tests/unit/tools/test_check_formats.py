"""check_gpu's comparison of quantised weights: it passes on a CPU, sees faults, and on a GPU it is the GPU's test."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_tiedlora.base.base_formats import BASE_FORMATS
from megatron_tiedlora.gpu_checks import formats
from megatron_tiedlora.gpu_checks.records import Report
from megatron_tiedlora.parallel.fp8_products import Fp8ProductWeight

CPU = torch.device("cpu")


def statuses(device: torch.device) -> dict[str, str]:
    report = Report("p")
    formats.check_base_formats(report, device)
    return {check.name: check.status for check in report.checks}


def test_a_cpu_passes() -> None:
    found = statuses(CPU)
    assert len(found) == len(BASE_FORMATS) * len(formats.WIDTHS) + 2 and set(found.values()) == {"pass"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_passes() -> None:
    assert set(statuses(torch.device("cuda")).values()) <= {"pass", "skip"}


def test_a_number_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original, made = formats._loaded, []

    def loaded(*arguments: Any, **products: Any) -> Any:
        weight = original(*arguments, **products)
        made.append(weight)
        if not products and len(made) % 2 == 0:
            next(iter(weight.parameters.values())).data[7, 3] ^= 8
        return weight

    monkeypatch.setattr(formats, "_loaded", loaded)
    found = statuses(CPU)
    assert [status for name, status in found.items() if "bits" in name] == ["fail"] * 6


@pytest.mark.parametrize("way", ["times", "times_transposed"])
def test_a_product_without_a_scale_is_seen(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(Fp8ProductWeight, way)

    def without(self: Fp8ProductWeight, rows: torch.Tensor) -> Any:
        return original(self, rows if self.dtype != torch.bfloat16 else rows * 1.02)

    monkeypatch.setattr(Fp8ProductWeight, way, without)
    assert [status for name, status in statuses(CPU).items() if "products" in name] == ["fail"] * 2
