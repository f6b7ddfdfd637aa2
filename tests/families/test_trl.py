"""TRL trains the method: the gradients of SFT, DPO and GRPO are those of the dense merged model in fp64; the reference
model is the base; a saved adapter is native.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, prepare_model_for_kbit_training, set_peft_model_state_dict
from support.engine_runs import relative_distance
from support.native_files import write_native
from support.oracle import OracleAdapter, OracleConfig, cast_weights, load_weights, merged_weights, oracle_logits
from support.peft_models import TARGETS, hf_model, nf4_model
from support.tiny_models import random_adapter, write_tiny_model
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

import megatron_tiedlora
from megatron_tiedlora.checkpoint.sources import demo_model_path
from megatron_tiedlora.peft import TiedLoraConfig

trl = pytest.importorskip("trl", reason="TRL is not installed")
STEPS, RANK, ALPHA, BETA, LAYERS = 5, 3, 6.0, 0.3, (1, 3)
# Rows of different lengths, so that every batch has padding.
ROWS = [
    {"prompt": f"{'ab' * row}?", "chosen": f" yes{'!' * row}", "rejected": f" no{'.' * (6 - row)}"} for row in range(8)
]
OWN: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 64},
    "dpo": {"beta": BETA},
    "grpo": {"beta": BETA, "num_generations": 2, "max_completion_length": 6, "per_device_train_batch_size": 4},
}


def reward(completions: Sequence[str], **_: Any) -> list[float]:
    """Differs between the completions of a prompt."""
    return [float(sum(map(ord, text)) % 11) for text in completions]


@dataclass
class Run(TrainerCallback):
    """A trainer, the gradients of each step that it takes, and the micro-batches of the first one."""

    trainer: Any = None
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    batches: list[dict[str, Any]] = field(default_factory=list)

    def on_pre_optimizer_step(self, *_: Any, **keywords: Any) -> None:
        trained = {name: weight for name, weight in factors_of(keywords["model"]).items() if weight.requires_grad}
        self.gradients.append({name: weight.grad.clone() for name, weight in trained.items()})


def factors_of(model: Any, adapter: str = "default") -> dict[str, Any]:
    """The parameters of an adapter, by their names in the native format."""
    mark = f".tied_lora_adapters.{adapter}."
    return {name.partition(mark)[2]: weight for name, weight in model.named_parameters() if mark in name}


def run_of(kind: str, model: Any, out: Path, peft_config: Any = None, **keywords: Any) -> Run:
    """A run of TRL's trainer, which has not begun; `keywords` of its config."""
    common: dict[str, Any] = {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    common |= {"max_steps": STEPS, "per_device_train_batch_size": 2, "max_grad_norm": 0.0, "disable_tqdm": True}
    common |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    config, run = getattr(trl, f"{kind.upper()}Config")(str(out), **common | OWN[kind] | keywords), Run()

    class Recorded(getattr(trl, f"{kind.upper()}Trainer")):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **keywords: Any) -> Any:
            if not run.gradients:
                run.batches.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **keywords)

    data, own = Dataset.from_list(ROWS), {"reward_funcs": reward} if kind == "grpo" else {}
    if kind == "sft":
        data = data.rename_column("chosen", "completion").remove_columns("rejected")
    own |= {"train_dataset": data, "peft_config": peft_config, "callbacks": [run]}
    run.trainer = Recorded(model=model, args=config, **own)
    return run


DEMO = [pytest.mark.slow, pytest.mark.skipif(not demo_model_path().is_dir(), reason="prepare the demo model first")]


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=DEMO)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 3 layers with 2 key-value heads of 4, or the demo model."""
    tiny = request.param == "tiny"
    return write_tiny_model(tmp_path_factory.mktemp("base"), head_dim=12) if tiny else demo_model_path()


def start_of(base: Path, method: str = "tl6") -> OracleAdapter:
    """Factors none of which is zero, of all linears of two layers."""
    sizes = OracleConfig.from_folder(base)
    common: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "layers": LAYERS, "seed": 4, "scale": 0.3}
    return random_adapter(method, sizes, targets=TARGETS["all"], **common)


def models() -> int:
    """How many models live, by their tables of embeddings."""
    gc.collect()
    return sum(isinstance(one, torch.nn.Embedding) for one in gc.get_objects())


Runs = Callable[..., Run]


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    @cache
    def run(kind: str, method: str = "tl6", checkpointing: bool = True) -> Run:
        before = models()
        config = TiedLoraConfig(method=method, r=RANK, alpha=ALPHA, layers=list(LAYERS), targets="all")
        own = {"gradient_checkpointing": checkpointing, "model_init_kwargs": {"dtype": "float32"}}
        found = run_of(kind, str(base), tmp_path_factory.mktemp("out"), config, **own)
        set_peft_model_state_dict(found.trainer.model, dict(start_of(base, method).tensors))
        found.trainer.train()
        assert getattr(found.trainer, "ref_model", None) is None and models() == before + 1
        return found

    return run


# The dense reference --------------------------------------------------------------------------------------------------

LogProbs = Callable[[Tensor, Tensor], list[Tensor]]


def log_probs_of(base: Path, start: OracleAdapter) -> LogProbs:
    """Log-probabilities (B, S - 1) of each token but the first, of the merged model and of the base, both in fp64."""
    sizes, weights = OracleConfig.from_folder(base), cast_weights(load_weights(base), torch.float64)
    merged = merged_weights(weights, sizes, start)

    def log_probs(tokens: Tensor, mask: Tensor) -> list[Tensor]:
        both = (oracle_logits(some, sizes, None, tokens, mask) for some in (merged, weights))
        return [one[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0] for one in both]

    return log_probs


def sft_loss(log_probs: LogProbs, batch: dict[str, Any]) -> Tensor:
    """Of each supervised token. In a step all tokens weigh the same."""
    return -log_probs(batch["input_ids"], batch["attention_mask"])[0][batch["labels"][:, 1:] != -100]


def dpo_loss(log_probs: LogProbs, batch: dict[str, Any]) -> Tensor:
    """Of each pair."""
    tokens, mask, kept = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    policy, reference = (one.where(kept[:, 1:].bool(), 0).sum(1) for one in log_probs(tokens, mask))
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected))


def grpo_loss(log_probs: LogProbs, batch: dict[str, Any]) -> Tensor:
    """Of each token of the completions. The ratio, which is 1, is also a factor of the KL term."""
    tokens, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    kept = batch["completion_mask"].bool()
    policy, reference = (one[:, -kept.shape[1] :][kept] for one in log_probs(tokens, mask))
    torch.testing.assert_close(batch["ref_per_token_logps"][kept].double(), reference, rtol=1e-4, atol=1e-4)
    advantages, gap = batch["advantages"][:, None].expand(kept.shape)[kept], reference - policy
    assert advantages.abs().max() > 0.1
    return (BETA * (gap.exp() - gap - 1) - advantages) * (policy - policy.detach()).exp()


LOSSES: dict[str, Callable[..., Tensor]] = {"sft": sft_loss, "dpo": dpo_loss, "grpo": grpo_loss}


# Tests ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_are_those_of_the_merged_model(runs: Runs, base: Path, kind: str) -> None:
    """Gradient checkpointing, TRL's default, changes nothing."""
    run, without, start = runs(kind), runs(kind, checkpointing=False), start_of(base).cast(torch.float64).leaves()
    log_probs, leaves = log_probs_of(base, start), {name: start.tensors[name] for name in start.trained}
    loss = torch.cat([LOSSES[kind](log_probs, batch) for batch in run.batches]).mean()
    wanted = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert run.trainer.args.gradient_checkpointing and not without.trainer.args.gradient_checkpointing
    assert len(run.batches) == 2 and len(run.gradients) == STEPS and wanted.keys() == run.gradients[0].keys()
    for name, gradient in wanted.items():
        assert relative_distance(run.gradients[0][name], gradient) < 2e-5, name
    for ours, others in zip(run.gradients, without.gradients, strict=True):
        assert all(relative_distance(ours[name], gradient) < 1e-4 for name, gradient in others.items())


@pytest.mark.parametrize(("kind", "method"), [("sft", "tl6"), ("dpo", "vera"), ("grpo", "tl6")])
def test_the_saved_adapter_is_that_of_the_model(runs: Runs, base: Path, tmp_path: Path, kind: str, method: str) -> None:
    trainer, start = runs(kind, method, checkpointing=False).trainer, start_of(base, method)
    trainer.save_model(str(tmp_path / "adapter"))
    saved, held = megatron_tiedlora.load_adapter(tmp_path / "adapter"), get_peft_model_state_dict(trainer.model)
    assert saved.config.method == method and saved.config.layers == LAYERS and held.keys() == saved.state.keys()
    for name, tensor in saved.state.items():
        assert torch.equal(tensor, held[name])
        assert torch.equal(tensor, start.tensors[name]) is (name not in start.trained), name
    tokens = torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(2))
    again = PeftModel.from_pretrained(hf_model(base), tmp_path / "adapter")
    logits = trainer.model.eval()(tokens).logits
    torch.testing.assert_close(again(tokens).logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trainer.model.merge_and_unload()(tokens).logits, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_trained_adapter_is_its_own_reference(base: Path, tmp_path: Path, kind: str) -> None:
    """TRL adds a frozen copy named "ref"."""
    start = start_of(base, "vera")
    write_native(tmp_path / "start", base, start)
    model = PeftModel.from_pretrained(hf_model(base), tmp_path / "start", is_trainable=True)
    trainer = run_of(kind, model, tmp_path).trainer
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    copy, trained = (megatron_tiedlora.load_adapter(tmp_path / "adapter" / name).state for name in ("ref", "."))
    for name, tensor in start.tensors.items():
        assert torch.equal(copy[name], tensor)
        assert torch.equal(trained[name], tensor) is (name not in start.trained), name
    assert not any(weight.requires_grad for weight in factors_of(trainer.model, "ref").values())


def test_a_quantised_base(tmp_path: Path) -> None:
    """TRL stores the trained factors of a quantised model in bf16, which a warning says; they can be fp32 again."""
    folder = write_tiny_model(tmp_path / "base", dtype=torch.bfloat16, hidden_size=128, intermediate_size=320)
    for again, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        model, config = prepare_model_for_kbit_training(nf4_model(folder)), TiedLoraConfig(method="vera", r=RANK)
        trainer = run_of("sft", model, tmp_path, config).trainer
        if again:
            trainer.model.base_model.tied_lora_adapters.float()
        u = factors_of(trainer.model)["u"]
        before = u.detach().clone()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.train()
        assert any("tied_lora_adapters.float()" in str(one.message) for one in told) is not again
        assert u.dtype == dtype and u.isfinite().all() and not torch.equal(u, before)
        trainer.save_model(str(tmp_path / "adapter"))
        assert megatron_tiedlora.load_adapter(tmp_path / "adapter").state["u"].dtype == torch.float32
