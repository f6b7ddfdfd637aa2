"""The method in PEFT: it is registered; adapters lie side by side, are merged, trained and deleted; native folders have
the logits of the exported LoRA there, and come back bit-equal."""

from __future__ import annotations

import copy
import enum
import pickle
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from support.folders import python
from support.peft_models import BASES, hf_model, logits_of, write_adapter, write_bases
from support.run_files import edit_json, edit_tensors, flip_last_value
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora import peft as tied_peft
from megatron_tiedlora.adapters.tied_adapter import initial_values, make_adapter_config, targets_of
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.methods import METHOD_NAMES, METHODS
from megatron_tiedlora.checkpoint.native_adapter import PEFT_TYPE, load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.inputs import check_base
from megatron_tiedlora.peft.method import TiedLoraConfig, TiedLoraModel


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models, with adapters "one" (all targets) and "two" (the MLP alone) of the llama."""
    root = tmp_path_factory.mktemp("bases")
    found = write_bases(root)
    one = write_adapter(root / "one", found["llama"], "tl6", "all")
    two = write_adapter(root / "two", found["llama"], "vera", "mlp", seed=5)
    assert one.config.rank == two.config.rank
    return {**found, "one": root / "one", "two": root / "two"}


def both(bases: dict[str, Path], *, trained: bool = False) -> PeftModel:
    model = PeftModel.from_pretrained(hf_model(bases["llama"]), bases["one"], adapter_name="one", is_trainable=trained)
    model.load_adapter(str(bases["two"]), "two")
    return model


def trained_names(model: PeftModel) -> set[str]:
    return {
        name.partition("tied_lora_adapters.")[2] for name, weight in model.named_parameters() if weight.requires_grad
    }


def test_adapters_side_by_side(bases: dict[str, Path], tmp_path: Path) -> None:
    alone = {
        name: logits_of(PeftModel.from_pretrained(hf_model(bases["llama"]), bases[name])) for name in ("one", "two")
    }
    plain, model = logits_of(hf_model(bases["llama"])), both(bases)
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits_of(model), alone[name]) and not torch.equal(alone[name], plain)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(model), alone["one"])
    model.base_model.set_adapter(["one", "two"])
    together = logits_of(model)
    assert not torch.equal(together, alone["one"]) and not torch.equal(together, alone["two"])
    model.save_pretrained(tmp_path)
    assert all(load_native_adapter(tmp_path / name).equals(load_native_adapter(bases[name])) for name in ("one", "two"))
    model.base_model.set_adapter("one")
    model.delete_adapter("one")
    assert model.active_adapters == ["two"] and torch.equal(logits_of(model), alone["two"])
    assert not any(".one." in name for name in model.state_dict())
    assert torch.equal(logits_of(model.unload()), plain)


def test_loading_another_adapter_freezes_nothing(bases: dict[str, Path]) -> None:
    factors = {f"one.{target}{factor}" for target in ("", "o_proj.", "gate_up.", "down_proj.") for factor in "ABuv"}
    model = both(bases, trained=True)
    assert trained_names(model) == factors
    model.set_adapter("two")  # a vera: A and B stay frozen
    assert trained_names(model) == {f"two.{target}.{factor}" for target in ("gate_up", "down_proj") for factor in "uv"}
    model.set_adapter("one")
    assert trained_names(model) == factors
    with model.disable_adapter():
        assert trained_names(model) == set()
    assert trained_names(model) == factors
    again = copy.deepcopy(model)  # as trainers make reference models
    assert trained_names(again) == factors and torch.equal(logits_of(again), logits_of(model))


def test_merging_and_unmerging(bases: dict[str, Path]) -> None:
    model, plain = both(bases), logits_of(hf_model(bases["llama"]))
    separate = logits_of(model)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model), separate, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():  # PEFT unmerges then
        torch.testing.assert_close(logits_of(model), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(model), separate, rtol=1e-4, atol=1e-4)
    model.merge_adapter(["one", "two"])
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), separate, rtol=1e-4, atol=1e-4)


def test_names_of_tensors_are_no_names_of_adapters(bases: dict[str, Path]) -> None:
    for name in ("A", "v", "o_proj"):
        said = refusal(get_peft_model, hf_model(bases["llama"]), TiedLoraConfig(), adapter_name=name)
        assert f"adapter name '{name}' is a tensor's name" in said
    model = both(bases)
    assert "tensor's name" in refusal(model.load_adapter, str(bases["one"]), "u")
    assert set(model.peft_config) == {"one", "two"} and torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_step_with_gradient_checkpointing_is_the_step_without(bases: dict[str, Path], reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = hf_model(bases["llama"])
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = get_peft_model(base, TiedLoraConfig(r=2, targets="all"))
        model.train()
        tokens = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(2))
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert len(gradients[0]) == 16 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


# Native folders and back ---------------------------------------------------------------------------------------------

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def prefixed(name: str) -> str:
    return f"base_model.tied_lora_adapters.default.{name}"


# Half of all, in which each pair of method, family and targets occurs.
ROUND_TRIPS = [
    (method, family, targets)
    for (i, method), (j, family), (k, targets) in product(*map(enumerate, (METHOD_NAMES, BASES, ("qkv", "all"))))
    if (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("method", "family", "targets"), ROUND_TRIPS)
def test_native_to_peft_to_native(
    bases: dict[str, Path], tmp_path: Path, method: str, family: str, targets: str
) -> None:
    base = bases[family]
    native = write_adapter(tmp_path / "native", base, method, targets)
    model = PeftModel.from_pretrained(hf_model(base), tmp_path / "native")
    export_peft(find_model(str(base)), native, tmp_path / "lora")
    lora = PeftModel.from_pretrained(hf_model(base), tmp_path / "lora")
    mine, theirs, plain = logits_of(model), logits_of(lora), logits_of(hf_model(base))
    assert torch.equal(mine, theirs) and (mine - plain).abs().max() > 0.05
    model.save_pretrained(tmp_path / "saved")
    saved = load_native_adapter(tmp_path / "saved")
    assert saved.equals(native) and not saved.has_checksums and load_native_adapter(tmp_path / "native").has_checksums
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == native.config.tensors.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stay_in_fp32_on_a_base_of_16_bits(bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    native = write_adapter(tmp_path / "native", bases["llama"], targets="all")
    export_peft(find_model(str(bases["llama"])), native, tmp_path / "lora")
    lora = PeftModel.from_pretrained(hf_model(bases["llama"], dtype), tmp_path / "lora")
    for low in (False, True):  # PEFT's own LoRA is rounded to 16 bits with low_cpu_mem_usage
        base = hf_model(bases["llama"], dtype)
        tied = PeftModel.from_pretrained(base, tmp_path / "native", low_cpu_mem_usage=low)
        assert torch.equal(logits_of(tied), logits_of(lora))
        tied.save_pretrained(tmp_path / f"saved{low}")
        assert load_native_adapter(tmp_path / f"saved{low}").equals(native)


def test_a_folder_that_peft_wrote_is_accepted_with_a_note(bases: dict[str, Path], tmp_path: Path) -> None:
    source = find_model(str(bases["llama"]))
    write_adapter(tmp_path / "native", bases["llama"])
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "saved")  # finds the base
    _, notes = check_base(source, load_native_adapter(tmp_path / "saved"))
    assert notes == ("--adapter: its files have no checksums (PEFT wrote them), so that damage to them is not found",)
    assert check_base(source, load_native_adapter(tmp_path / "native"))[1] == ()


@pytest.mark.parametrize("read", [PeftConfig.from_pretrained, TiedLoraConfig.from_pretrained])
def test_the_config_is_that_of_the_folder(tmp_path: Path, read: Any) -> None:
    base, stored = write_tiny_model(tmp_path / "model"), tmp_path / "native"
    write_adapter(stored, base)
    config, native = read(str(stored)), load_native_adapter(stored)
    assert isinstance(config, TiedLoraConfig) and config.method == native.config.method
    assert (config.r, config.alpha, config.layers) == (
        *(native.config.rank, native.config.alpha), list(native.config.layers),
    )  # fmt: skip
    model = PeftModel.from_pretrained(hf_model(base), stored)
    model.load_adapter(str(stored), "again")
    model.save_pretrained(tmp_path / "saved")
    for saved in (tmp_path / "saved", tmp_path / "saved" / "again"):
        assert load_native_adapter(saved).equals(native)
    assert (tmp_path / "saved" / "README.md").is_file()  # PEFT's model card is no obstacle


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_new_adapter_has_the_package_s_initial_values(bases: dict[str, Path], method: str, tmp_path: Path) -> None:
    shape = find_model(str(bases["llama"])).shape
    config = TiedLoraConfig(method=method, r=3, layers=[2, 3], targets="all", seed=7)
    model = get_peft_model(hf_model(bases["llama"]), config)
    targets = targets_of(shape, ("qkv", "o_proj", "gate_up", "down_proj"))
    expected = make_adapter_config(method, rank=3, layers=(2, 3), targets=targets, seed=7)
    held = {name: weight for name, weight in model.named_parameters() if "tied_lora" in name}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {prefixed(name) for name in expected.num_trained()} and trained <= held.keys()
    assert model.get_nb_trainable_parameters()[0] == sum(expected.num_trained().values())
    initial = initial_values(expected)
    assert len(held) == len(initial) - 4 * sum(not METHODS[method].factor(name).trained for name in "uv")
    model.save_pretrained(tmp_path / "saved")
    saved = load_native_adapter(tmp_path / "saved")
    assert saved.config == expected
    assert all(torch.equal(saved.state[name], tensor) for name, tensor in initial.items())
    assert check_base(find_model(str(bases["llama"])), saved, uses_tokenizer=False)  # it knows its base


def retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / WEIGHTS, change)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (retensor(lambda t: t.pop("u")), "adapter default: tensor u is missing"),
    "unexpected": (retensor(lambda t: t.update(w=torch.ones(1))), "holds a tensor 'w' that does not belong there"),
    "shape": (retensor(lambda t: t.update(v=torch.ones(2, 3))), "v has shape (2, 3), expected (2, 96)"),
    "not finite": (retensor(lambda t: t["u"].fill_(torch.nan)), "u holds numbers that are not finite"),
    "edited": (lambda f: edit_json(f / CONFIG, rank=5, seals=False), "its own checksum"),
    "flipped": (lambda f: flip_last_value(f / WEIGHTS), "its checksum"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_an_error(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    write_adapter(tmp_path / "native", bases["llama"])
    damage, message = DAMAGE[case]
    damage(tmp_path / "native")
    assert message in refusal(PeftModel.from_pretrained, hf_model(bases["llama"]), tmp_path / "native")


@pytest.mark.parametrize("damaged", [False, True])
def test_the_first_download_is_compared_with_its_checksum(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """The hub sends the config, PEFT reads it, and only then the weights are sent."""
    native = write_adapter(tmp_path / "hub", bases["llama"])
    if damaged:
        flip_last_value(tmp_path / "hub" / WEIGHTS)
    sent = []

    def download(repo: str, filename: str, **_: Any) -> str:
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        sent.append(filename)
        return str(shutil.copy(tmp_path / "hub" / filename, tmp_path / "snapshot" / filename))

    for module in ("peft.config", "peft.utils.save_and_load"):
        monkeypatch.setattr(f"{module}.hf_hub_download", download)
    monkeypatch.setattr("peft.utils.save_and_load.file_exists", lambda *_, **__: True)
    if damaged:
        said = refusal(PeftModel.from_pretrained, hf_model(bases["llama"]), "org/adapter")
        assert "snapshot/adapter_model.safetensors: does not match its checksum" in said
    else:
        model = PeftModel.from_pretrained(hf_model(bases["llama"]), "org/adapter")
        model.save_pretrained(tmp_path / "saved")
        assert load_native_adapter(tmp_path / "saved").equals(native) and model.peft_config["default"].unchecked is None
    assert sent.index(CONFIG) < sent.index(WEIGHTS)


def test_another_base_is_an_error_or_a_warning(bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tmp_path / "native", bases["llama"])
    with pytest.raises(UserError, match=r"with head_dim 12, but .* has 8; use its own base"):
        PeftModel.from_pretrained(hf_model(bases["phi3"]), tmp_path / "native")
    other = write_tiny_model(tmp_path / "other", head_dim=12, seed=1)
    with pytest.warns(UserWarning, match=r"whose weights differ from .*other's"):
        PeftModel.from_pretrained(hf_model(other), tmp_path / "native")


WRONG: dict[str, tuple[Any, str]] = {
    "method": ("tl7", "unknown method 'tl7'"),
    "r": (0, "r = 0 is not a positive integer"),
    "alpha": (-1.0, "alpha = -1 is not between"),
    "targets": (["q_proj"], "targets: 'q_proj' is unknown (part of qkv)"),
    "layers": ([2, 9], "layers [2, 9] are not ascending numbers from 1 to 3"),
    "task_type": ("SEQ_CLS", "task_type SEQ_CLS is not implemented"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_is_one_line(bases: dict[str, Path], name: str) -> None:
    value, message = WRONG[name]
    assert message in refusal(lambda: get_peft_model(hf_model(bases["llama"]), TiedLoraConfig(**{name: value})))


# Registering the method: once, in an enumeration that PEFT does not extend ------------------------------------------


def test_the_type_is_a_member_like_any_other() -> None:
    kind = peft.PeftType
    assert kind(PEFT_TYPE) is kind[PEFT_TYPE] is getattr(kind, PEFT_TYPE) and f"{kind(PEFT_TYPE).value}" == PEFT_TYPE
    assert PEFT_TYPE in list(kind) and isinstance(kind(PEFT_TYPE), kind) and kind(PEFT_TYPE) != kind.LORA
    assert pickle.loads(pickle.dumps(kind(PEFT_TYPE))) is kind(PEFT_TYPE)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] is TiedLoraConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] is TiedLoraModel


def test_registering_again_changes_nothing() -> None:
    before = list(peft.PeftType), peft.config.PeftConfigMixin.from_json_file.__func__
    tied_peft.register()
    assert before == (list(peft.PeftType), peft.config.PeftConfigMixin.from_json_file.__func__)


def test_a_peft_that_is_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BaseTuner, "_remap_adapter_state_dict_for_load")
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(ImportError, match=r"needs PEFT 0.21 or later, and this is 0.20.0; run `pip install -U peft`"):
        tied_peft.register()


def test_without_peft_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"megatron_tiedlora.peft needs PEFT .*; run `pip install 'peft>=0.21'`"):
        tied_peft.register()


class Refusing(enum.EnumMeta):
    def __setattr__(cls, name: str, value: Any) -> None:
        if name == PEFT_TYPE:
            raise AttributeError(name)
        super().__setattr__(name, value)


class Sealed(enum.StrEnum, metaclass=Refusing):
    LORA = "LORA"


def test_a_peft_that_does_not_allow_it_is_one_line() -> None:
    with pytest.raises(ImportError, match=r"PEFT 9.9 does not allow a type of another package \(TIED_LORA\)"):
        tied_peft._add_type(Sealed, PEFT_TYPE, version="9.9")
    assert PEFT_TYPE not in Sealed.__members__


@pytest.mark.slow
def test_peft_alone_names_the_missing_type(tmp_path: Any) -> None:
    """Without the import PEFT says only this; docs/peft.md explains it."""
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{PEFT_TYPE}", "format_version": 2}}')
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    ended = python("-c", code)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1] == f"KeyError: '{PEFT_TYPE}'"
