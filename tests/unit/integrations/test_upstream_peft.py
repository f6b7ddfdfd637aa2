"""The method as written for PEFT's own tree (upstream/peft): for the same values it gives the logits and gradients of
the package's method, its change fits the installed PEFT, and a checkout that does not fit is left as it was."""

from __future__ import annotations

import importlib
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from support.folders import ROOT, python
from support.oracle import OracleAdapter, OracleConfig
from support.oracle_adapter import TARGET_PARTS, tensor_name
from support.peft_models import TARGETS, hf_model, share
from support.tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.base.methods import METHODS
from megatron_tiedlora.peft import TiedLoraConfig

UPSTREAM = ROOT / "upstream/peft"
TIED = [name for name in METHODS if name.startswith("tl")]


@pytest.fixture(scope="module")
def upstream() -> Iterator[Any]:
    """The module `model` of the upstream package, not registered, as this package's method has its name."""
    package = types.ModuleType("peft.tuners.tied_lora")
    package.__path__ = [str(UPSTREAM / "src/peft/tuners/tied_lora")]
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, package.__name__, package)
    mapping = "TRANSFORMERS_MODELS_TO_{}_TARGET_MODULES_MAPPING"
    patch.setattr(peft.utils, mapping.format("TIED_LORA"), getattr(peft.utils, mapping.format("LORA")), raising=False)
    yield importlib.import_module("peft.tuners.tied_lora.model")
    for name in [name for name in sys.modules if name.startswith(f"{package.__name__}.")]:
        del sys.modules[name]
    patch.undo()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "llama", head_dim=12)


def upstream_tensors(
    adapter: OracleAdapter, sizes: OracleConfig, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Tensors in the shapes of a native adapter, by upstream's names. A shared tensor is the first module's."""
    named: dict[str, torch.Tensor] = {}
    for target in adapter.targets:
        parts, rows = list(TARGET_PARTS[target].values()), list(sizes.target_rows(target))
        for index, layer in enumerate(adapter.layers):
            for factor in "ABuv":
                if (name := tensor_name(target, factor)) not in tensors:
                    continue
                held = tensors[name] if factor in "AB" else tensors[name][index]
                pieces = [held] if factor in "Au" else held.split(rows)
                for part, piece in zip(parts, pieces, strict=False):
                    if index == 0 or factor in "uv":
                        named[f"model.model.layers.{layer - 1}.{part}.tied_lora_{factor}"] = piece.float()
    return named


@pytest.mark.parametrize("targets", ["qkv", "all"])
@pytest.mark.parametrize("method", TIED)
def test_logits_and_gradients_are_those_of_the_package(upstream: Any, base: Path, method: str, targets: str) -> None:
    sizes = OracleConfig.from_folder(base)
    adapter = random_adapter(method, sizes, alpha=6, layers=(1, 3), targets=TARGETS[targets])
    common = {"method": method, "r": adapter.rank}
    config = TiedLoraConfig(**common, alpha=6, layers=[1, 3], targets=list(TARGETS[targets]))
    ours = get_peft_model(hf_model(base), config)
    set_peft_model_state_dict(ours, {name: tensor.float() for name, tensor in adapter.tensors.items()})
    modules = [part.rpartition(".")[2] for target in adapter.targets for part in TARGET_PARTS[target].values()]
    config = upstream.TiedLoraConfig(**common, tied_lora_alpha=6, target_modules=modules, layers_to_transform=[0, 2])
    theirs = upstream.TiedLoraModel(hf_model(base), config, "default")

    state = ((n.removesuffix(".default").replace("frozen_", ""), t) for n, t in theirs.state_dict().items())
    held, values = {n: t for n, t in state if "tied_lora" in n}, upstream_tensors(adapter, sizes, adapter.tensors)
    assert held.keys() == {n for n in values if n[-1] in "AB" or METHODS[method].factor(n[-1]).trained}
    for name, tensor in held.items():
        tensor.copy_(values[name])

    ids = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    outputs = [model(ids, labels=ids) for model in (ours, theirs)]
    assert share(outputs[0].logits, outputs[1].logits) < 2e-6
    for output in outputs:
        output.loss.backward()
    of_ours = ours.base_model.tied_lora_adapters["default"].named_parameters()
    wanted = upstream_tensors(adapter, sizes, {name: p.grad for name, p in of_ours if p.grad is not None})
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == {f"{name}.default" for name in wanted}
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0 and share(gradient, found[f"{name}.default"]) < 2e-5, name


def test_the_change_fits_the_installed_peft(tmp_path: Path) -> None:
    shutil.copytree(Path(peft.__file__).parent, tmp_path / "src/peft", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src/peft/utils/constants.py").rename(tmp_path / "constants.py")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.py")}
    refused = python(UPSTREAM / "apply.py", tmp_path)
    assert refused.returncode and "does not fit" in refused.stderr and "constants.py" in refused.stderr
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.py")}

    (tmp_path / "constants.py").rename(tmp_path / "src/peft/utils/constants.py")
    assert "in src of" in python(UPSTREAM / "apply.py", tmp_path).stdout
    entries = sorted((UPSTREAM / "method_comparison/MetaMathQA/experiments/tied_lora").iterdir())
    read = f"import peft; print([peft.PeftConfig.from_pretrained(f).method for f in {[str(f) for f in entries]}])"
    done = python("-c", f"{read}; import megatron_tiedlora.peft", PYTHONPATH=f"{tmp_path / 'src'}:{ROOT}")
    assert done.stdout.strip() == "['tl6', 'tl5']"
    assert "has a method TIED_LORA of its own" in done.stderr.splitlines()[-1]
    again = python(UPSTREAM / "apply.py", tmp_path)
    assert again.returncode and "has Tied-LoRA already" in again.stderr
