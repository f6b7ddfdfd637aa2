"""Every flag of a command with settings is explained in a document."""

from __future__ import annotations

import re

import pytest
from folders import ROOT

from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import CommandSettings, field_flags
from megatron_tiedlora.config.launch_settings import LaunchSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.config.sweep_settings import SweepSettings

DOCUMENTS = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = frozenset(re.findall(r"--[a-z][a-z0-9_]*", "\n".join(file.read_text() for file in DOCUMENTS)))


@pytest.mark.parametrize(
    "kind", [Settings, EvaluateSettings, SweepSettings, LaunchSettings, DoctorSettings, BenchSettings]
)
def test_every_flag_is_in_a_document(kind: type[CommandSettings]) -> None:
    missing = [name for name, field in kind.model_fields.items() if not NAMED & {*field_flags(name, field)}]
    assert not missing
