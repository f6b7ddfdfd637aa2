"""What the doctor finds missing for a base of fewer bits and for products in fp8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_doctor_findings import hosts, layout, versions

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.doctor import trial
from megatron_tiedlora.cluster.doctor.compare import compare_hosts
from megatron_tiedlora.cluster.doctor.records import HostReport
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.runtime.machine import Finding, Gpu


def test_what_a_base_of_fewer_bits_needs() -> None:
    def findings(reports: list[HostReport], base: str | None, products: str | None) -> list[Finding]:
        found = compare_hosts(reports, layout(), max_skew=1.0, base_format=base, products=products)
        return [finding for finding in found if finding.code in ("bitsandbytes", "products")]

    def found(reports: list[HostReport], base: str | None, products: str | None) -> list[tuple[str, str, list[str]]]:
        return [(one.code, one.status, one.hosts) for one in findings(reports, base, products)]

    reports = hosts({"nodea": versions(bitsandbytes="0.50.2"), "nodec": versions(bitsandbytes="0.50.2")})
    assert found(reports, "nf4", None) == [("bitsandbytes", "warning", ["nodeb"])]
    assert found(reports, "int8", None) == found(reports, None, None) == found(reports, "fp8", "fp8") == []
    gpus = {}
    for name, capability in (("nodea", (9, 0)), ("nodeb", (8, 0)), ("nodec", (8, 9))):
        gpus[name] = {"gpus": [Gpu(name=f"GPU {name}", total_bytes=1, free_bytes=1, capability=capability)]}
    assert found(hosts(gpus), "fp8", "fp8") == [("products", "error", ["nodeb"])]
    (finding,) = findings(hosts(gpus), "fp8", "fp8")
    said = "--products fp8 needs a GPU of compute capability 8.9 or more, and GPU nodeb has 8.0"  # as a run says it
    assert finding.message.startswith(f"nodeb: {said}; leave")
    assert found(hosts(gpus), "fp8", None) == []


@pytest.mark.parametrize(
    ("quantised", "changes", "wrong"),
    [
        (True, {}, ""),
        (True, {"base": "nf4"}, ""),
        (True, {"base": "fp8", "products": "fp8"}, "weights in nf4 (by bitsandbytes) already"),
        (True, {"products": "fp8"}, "--products fp8 needs --base fp8; this base is in nf4"),
        (False, {"products": "fp8"}, "--products fp8 needs --base fp8; the linears of this base are not quantised"),
        (False, {"base": "nf4"}, ""),
    ],
)
def test_the_folder_s_own_format_counts(quantised: bool, changes: dict[str, str], wrong: str, tmp_path: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    fields = {"quantization_config": config} if quantised else {}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    settings = DoctorSettings(model=str(tmp_path), **changes)
    elsewhere = DoctorSettings(model="OWNER/NAME", **changes)  # whatever is in its config, each rank looks
    assert trial._base_format(elsewhere) == changes.get("base")
    if not wrong:
        assert trial._base_format(settings) == "nf4"
        return
    with pytest.raises(UserError) as raised:
        trial._base_format(settings)
    assert wrong in str(raised.value)
