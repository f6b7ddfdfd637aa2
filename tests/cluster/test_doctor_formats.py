"""What the doctor finds missing for a base of fewer bits and for products in fp8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_doctor_findings import hosts, versions

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.doctor import examine
from megatron_tiedlora.cluster.doctor.compare import look_at_formats
from megatron_tiedlora.cluster.doctor.records import Gpu, HostReport
from megatron_tiedlora.config.doctor_settings import DoctorSettings


def test_what_a_base_of_fewer_bits_needs() -> None:
    def found(reports: list[HostReport], base: str | None, products: str | None) -> list[tuple[str, str, list[str]]]:
        findings = look_at_formats(reports, base_format=base, products=products)
        return [(finding.code, finding.level, finding.hosts) for finding in findings]

    reports = hosts({"nodea": versions(bitsandbytes="0.50.2"), "nodec": versions(bitsandbytes="0.50.2")})
    assert found(reports, "nf4", None) == [("bitsandbytes", "warning", ["nodeb"])]
    assert found(reports, "int8", None) == found(reports, None, None) == found(reports, "fp8", "fp8") == []
    gpus = {}
    for name, capability in (("nodea", (9, 0)), ("nodeb", (8, 0)), ("nodec", (8, 9))):
        gpus[name] = {"gpus": [Gpu(name=f"GPU {name}", total_bytes=1, free_bytes=1, capability=capability)]}
    assert found(hosts(gpus), "fp8", "fp8") == [("products", "error", ["nodeb"])]
    (finding,) = look_at_formats(hosts(gpus), base_format="fp8", products="fp8")
    assert "nodeb: GPU nodeb cannot multiply in fp8: it needs compute capability 8.9" in finding.message
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
    assert examine._base_format(elsewhere) == changes.get("base")
    if not wrong:
        assert examine._base_format(settings) == "nf4"
        return
    with pytest.raises(UserError) as raised:
        examine._base_format(settings)
    assert wrong in str(raised.value)
