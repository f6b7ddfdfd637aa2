"""What the doctor finds missing for a base of fewer bits and for products in fp8."""

from __future__ import annotations

from test_doctor_findings import hosts, versions

from megatron_tiedlora.cluster.doctor.compare import look_at_formats
from megatron_tiedlora.cluster.doctor.records import Gpu, HostReport


def test_what_a_base_of_fewer_bits_needs() -> None:
    def found(reports: list[HostReport], base: str | None, products: str | None) -> list[tuple[str, str, list[str]]]:
        findings = look_at_formats(reports, base=base, products=products)
        return [(finding.code, finding.level, finding.hosts) for finding in findings]

    reports = hosts({"nodea": versions(bitsandbytes="0.50.2"), "nodec": versions(bitsandbytes="0.50.2")})
    assert found(reports, "nf4", None) == [("bitsandbytes", "warning", ["nodeb"])]
    assert found(reports, "int8", None) == found(reports, None, None) == found(reports, "fp8", "fp8") == []
    gpus = {}
    for name, capability in (("nodea", (9, 0)), ("nodeb", (8, 0)), ("nodec", (8, 9))):
        gpus[name] = {"gpus": [Gpu(name=f"GPU {name}", total_bytes=1, free_bytes=1, capability=capability)]}
    assert found(hosts(gpus), "fp8", "fp8") == [("products", "error", ["nodeb"])]
    (finding,) = look_at_formats(hosts(gpus), base="fp8", products="fp8")
    assert "nodeb: GPU nodeb cannot multiply in fp8: it needs compute capability 8.9" in finding.message
    assert found(hosts(gpus), "fp8", None) == []
