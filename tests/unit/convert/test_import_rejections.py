"""PEFT folders that are not read as native adapters: a line that names the file, the value and the fix."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.native_files import with_adapter, write_native
from support.peft_folders import CONFIG, WEIGHTS, changed, rejection
from support.peft_models import lora_model, vera_model
from support.task_files import refusal

from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.inputs import adapter_kind
from megatron_tiedlora.convert.open_adapter import read_peft

Rows = list[tuple[dict[str, Any], str]]


@pytest.fixture(scope="module")
def given(separate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain/, a LoRA of q and v as PEFT writes it, vera/, a VeRA of k and v, and drawn/, one without A and B."""
    folder = tmp_path_factory.mktemp("given")
    lora_model(separate, r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]).save_pretrained(folder / "plain")
    of_vera = {"r": 3, "target_modules": ["k_proj", "v_proj"]}
    vera_model(separate, **of_vera).save_pretrained(folder / "vera")
    vera_model(separate, **of_vera, save_projection=False).save_pretrained(folder / "drawn")
    return folder


FIELDS: Rows = [
    ({"peft_type": "LOHA"}, "peft_type LOHA is not supported; only LORA and VERA are"),
    ({"use_dora": True}, "use_dora = True is not a plain LoRA"),
    ({"bias": "lora_only"}, "bias = 'lora_only' trains biases"),
    ({"lora_bias": True}, "lora_bias = True is not a plain LoRA"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not a plain LoRA"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = "),
    ({"trainable_token_indices": [1]}, "trainable_token_indices = "),
    ({"a_field_to_come": 1}, "a_field_to_come = 1 is not a plain LoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' changes the base weights too"),
    ({"target_modules": ["q_proj", "lm_head"]}, "target module lm_head is not supported. Supported: q_proj, k"),
    ({"target_modules": "all-linear"}, "target_modules = 'all-linear' is not supported"),
    ({"target_modules": None}, "target_modules = None is not supported"),
    ({"target_modules": "q_proj"}, "target_modules 'q_proj' match no q_proj"),  # a whole name has to match it
    ({"target_modules": "(q"}, r"target_modules: the pattern '\(q' is not supported. .*letters, .* Write a list"),
    ({"exclude_modules": 3}, "exclude_modules = 3 is neither a pattern nor a list of names. Write a list of names"),
    ({"layers_to_transform": [3]}, "layers_to_transform has 3, but .* has layers 0 to 2; give the adapter's own"),
    ({"layers_to_transform": 0.5}, "layers_to_transform = 0.5 is neither a layer nor a list"),
    ({"r": 0}, "r = 0 is not an integer from 1 to"),
    ({"r": True}, "r = True is not an integer"),
    ({"lora_alpha": None}, "lora_alpha = None is not a number"),
    ({"lora_alpha": 0}, "lora_alpha = 0 is not between"),
    ({"lora_alpha": -2}, "lora_alpha = -2 is not between"),
    ({"lora_alpha": 2**53}, "lora_alpha = 9007199254740992 is not between"),
    ({"lora_alpha": 1e6}, r"its native alpha = 2000000.0 is not between 1e-06 and 1e\+06; scale lora_B inst"),
    ({"rank_pattern": ["q_proj"]}, r"rank_pattern = \['q_proj'\] is not an object {pattern: value}; remove it"),
    ({"rank_pattern": {"q_proj": -8}}, "rank_pattern: 'q_proj' = -8 is not an integer from 1 to 1,048,576"),
    ({"rank_pattern": {"q_proj": 8.0}}, "rank_pattern: 'q_proj' = 8.0 is not an integer"),
    ({"rank_pattern": {"nothing": True}}, "rank_pattern: 'nothing' = True is not an integer"),
    ({"rank_pattern": {"(.*)*!": 8}}, r"rank_pattern: the pattern '\(\.\*\)\*!' is not supported. .* Write endings"),
    ({"rank_pattern": {"q_proj)(": 8}}, r"rank_pattern: the pattern 'q_proj\)\(' is not supported"),
    ({"rank_pattern": {f"{n}.{'q' * 900}": 8 for n in range(60)}}, "rank_pattern: its patterns have 54,"),
    ({"alpha_pattern": 8}, "alpha_pattern = 8 is not an object"),
    ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern: 'q_proj' = '8' is not a number"),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern: 'q_proj' = 0 is not between"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern: 'q_proj' = nan is not between"),
]
FIELDS_OF_VERA: Rows = [
    ({"bias": "vera_only"}, "bias = 'vera_only' trains biases"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not a plain VeRA; only a plain VeRA is"),
    ({"exclude_modules": ["v_proj"]}, "exclude_modules = .* is not a plain VeRA"),  # PEFT's VeRA has no such field
    ({"lora_alpha": 8}, "lora_alpha = 8 is not a plain VeRA"),
    ({"a_field_to_come": 1}, "a_field_to_come = 1 is not a plain VeRA"),
    ({"r": None}, "r = None is not an integer from 1 to"),
    ({"target_modules": ["k_proj", "lm_head"]}, "target module lm_head is not supported. Supported: q_proj, k"),
    ({"layers_to_transform": [3]}, "layers_to_transform has 3, but .* has layers 0 to 2"),
]


LAYERS = "base_model.model.model.layers"
Q1, K1, A, B = f"{LAYERS}.1.self_attn.q_proj", f"{LAYERS}.1.self_attn.k_proj", "base_model.vera_A", "base_model.vera_B"
TENSORS: Rows = [
    ({f"{Q1}.lora_A.weight": None}, f"{Q1}.lora_A.weight is missing, but {CONFIG} targets its module"),
    ({f"{Q1}.lora_B.weight": None}, f"{Q1}.lora_B.weight is missing"),
    ({f"{Q1}.lora_A.weight": torch.ones(2, 32)}, r"\S* has shape \(2, 32\), but .* it must be \(3, 32\)"),
    ({f"{Q1}.lora_A.weight": torch.ones(3, 64)}, r"\S* has shape \(3, 64\), but .* it must be \(3, 32\)"),
    ({f"{Q1}.lora_B.weight": torch.ones(32, 3)}, r"\S* has shape \(32, 3\), but .* it must be \(48, 3\)"),
    ({f"{Q1}.lora_B.weight": torch.full((48, 3), torch.inf)}, r"\S* holds numbers that are not finite"),
    ({f"{Q1}.lora_B.weight": torch.ones(48, 3, dtype=torch.int8)}, r"\S* is I8, not floating point"),
    ({f"{Q1}.lora_magnitude_vector": torch.ones(48)}, r"\S* is not a LoRA factor of q_proj, .*, down_proj; only"),
    ({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 48)}, r"\S*lm_head\S* is not a LoRA factor"),
    ({f"{LAYERS}.3.self_attn.q_proj.lora_A.weight": torch.ones(3, 32)}, r"\S* is for layer 3, but .* 0 to 2; give"),
    ({f"{LAYERS}.0.self_attn.k_proj.lora_A.weight": torch.ones(3, 32)}, r"\S* is present, but \S* does not target"),
]
TENSORS_OF_VERA: Rows = [
    ({A: None}, f"{A} is missing, but every module uses it"),
    ({B: None}, f"{B} is missing, but every module uses it"),
    ({f"{K1}.vera_lambda_d": None}, f"{K1}.vera_lambda_d is missing, but {CONFIG} targets its module"),
    ({A: torch.ones(2, 32)}, r"\S* has shape \(2, 32\), but .* it must be \(3, 32\)"),
    ({B: torch.ones(48, 3)}, r"\S* has shape \(48, 3\), but .* it must be \(24, 3\)"),  # q's rows
    ({f"{K1}.vera_lambda_b": torch.ones(3)}, r"\S* has shape \(3,\), but .* it must be \(24,\)"),
    ({f"{K1}.vera_lambda_d": torch.ones(24)}, r"\S* has shape \(24,\), but .* it must be \(3,\)"),
    ({f"{K1}.vera_lambda_d": torch.full((3,), torch.nan)}, r"\S* holds numbers that are not finite"),
    ({f"{K1}.vera_lambda_b": torch.full((24,), 1e38)}, "its update may reach .* so the file is damaged"),
    ({f"{K1}.lora_A.weight": torch.ones(3, 32)}, r"\S* is not a VeRA factor of q_proj, .*, down_proj; only"),
    ({f"{K1.replace('k_', 'q_')}.vera_lambda_d": torch.ones(3)}, r"\S* is present, but \S* does not target"),
]
FIELDS_OF_DRAWN: Rows = [
    ({"projection_prng_key": None}, "projection_prng_key = None is not an integer of 64 bits; correct it"),
    ({"projection_prng_key": 2**64}, "projection_prng_key = 18446744073709551616 is not an integer of 64 bits"),
]


ROWS = {("plain", CONFIG): FIELDS, ("vera", CONFIG): FIELDS_OF_VERA, ("plain", WEIGHTS): TENSORS}
ROWS |= {("vera", WEIGHTS): TENSORS_OF_VERA, ("drawn", CONFIG): FIELDS_OF_DRAWN}


@pytest.mark.parametrize(
    ("kind", "file", "changes", "said"), [(*where, *row) for where, rows in ROWS.items() for row in rows]
)
def test_a_field_or_a_tensor_that_does_not_fit_is_rejected_by_its_name(
    separate: Path, given: Path, tmp_path: Path, kind: str, file: str, changes: dict[str, Any], said: str
) -> None:
    folder = changed(given / kind, tmp_path / "adapter", file, changes)
    assert re.match(rf"{re.escape(file)}: {said}", rejection(separate, folder))


@pytest.mark.parametrize(
    ("kind", "saved", "said"),
    [
        ("vera", False, f"{A} is present, but {CONFIG} has save_projection = false; set it to true to use the tensor"),
        ("drawn", True, f"{A} is missing, but every module uses it; copy the adapter again"),
    ],
)
def test_a_vera_has_its_projections_in_the_file_or_a_key(
    separate: Path, given: Path, tmp_path: Path, kind: str, saved: bool, said: str
) -> None:
    folder = changed(given / kind, tmp_path / "adapter", CONFIG, {"save_projection": saved})
    assert rejection(separate, folder).startswith(f"{WEIGHTS}: {said}")


def test_patterns_that_do_not_fit_the_tensors(separate: Path, given: Path, tmp_path: Path) -> None:
    """A rank that the tensors do not have is an error; a pattern that matches no module has no effect, as in PEFT."""
    other = changed(given / "plain", tmp_path / "other", CONFIG, {"rank_pattern": {"v_proj": 2}})
    said = r"\S*v_proj\.lora_A\.weight has shape \(3, 32\), but with its rank in \S* and .* it must be \(2, 32\); give"
    assert re.match(rf"{re.escape(WEIGHTS)}: {said}", rejection(separate, other))
    unused = {"rank_pattern": {"q_pro": 2, "q_proj": 3}, "alpha_pattern": {"lm_head": 2, "v_proj": 5, r".*\.v_proj": 7}}
    folder = changed(given / "plain", tmp_path / "unused", CONFIG, unused)
    found = read_peft(folder, find_model(str(separate)))
    assert list(found.notes) == [
        f"{folder / CONFIG}: rank_pattern: ['q_pro'] applies to no adapted module",
        f"{folder / CONFIG}: alpha_pattern: ['lm_head', '.*\\\\.v_proj'] applies to no adapted module",
    ]
    expected = read_peft(given / "plain", find_model(str(separate))).adapter
    assert found.config == expected.config
    assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())


def test_folders_that_hold_no_peft_adapter(separate: Path, given: Path, tmp_path: Path) -> None:
    assert rejection(separate, tmp_path).startswith(f"{CONFIG}: no such file; expected a PEFT adapter folder")
    (tmp_path / CONFIG).write_text("{}")
    assert rejection(separate, tmp_path) == f"{CONFIG}: not a PEFT adapter (it has no peft_type); give another folder"
    shutil.copy(given / "plain" / CONFIG, tmp_path)
    assert rejection(separate, tmp_path).startswith(f"{WEIGHTS}: not a complete safetensors file")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert rejection(separate, tmp_path).startswith("adapter_model.bin: pickled weights are not read")


def test_kinds_of_folders(separate: Path, given: Path, tmp_path: Path) -> None:
    native = write_native(tmp_path / "run" / "adapter", separate, with_adapter(separate, "tl5")[2])
    step = save_checkpoint(tmp_path / "checkpoints", progress=Progress(), moments={}, settings={}, adapter=native)
    assert adapter_kind(str(tmp_path / "run" / "adapter")) == adapter_kind(step) == "native"
    assert adapter_kind(given / "plain") == "peft"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / CONFIG).write_text('{"r": 3}')
    (tmp_path / "empty").mkdir()
    for folder, said in {
        tmp_path / "run": f"--adapter {tmp_path}/run: this is a run folder; give {tmp_path}/run/adapter",
        tmp_path / "none": f"--adapter {tmp_path}/none: no such folder; give a run's adapter/ or checkpoints/",
        step.parent: f"--adapter {step.parent}: this is a folder of checkpoints; give one of them, {step.parent}/step",
        step.parent / "latest": f"--adapter {step.parent}/latest: this file names the newest checkpoint; give its",
        separate: f"--adapter {separate}: this is a model folder; give it with --model",
        tmp_path / "empty": f"--adapter {tmp_path}/empty: has no {CONFIG}; give the folder of a native or",
        tmp_path / "odd": f"{tmp_path}/odd/{CONFIG}: has neither format_version nor peft_type; give a native or",
    }.items():
        assert refusal(adapter_kind, folder).startswith(said)
