"""The oracle judges everything else, so it is judged first: against transformers, torch.optim and numbers by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.oracle import (
    OracleConfig,
    cast_weights,
    load_weights,
    merged_weights,
    oracle_logits,
    rope_amplitude,
    rope_frequencies,
    text_weights,
)
from support.oracle_adapter import ALL_TARGETS, TRAINED_TENSORS
from support.oracle_training import oracle_gradients, oracle_learning_rate, oracle_loss, oracle_train
from support.peft_models import hf_model
from support.tiny_models import (
    FAMILY_MODELS,
    pack_samples,
    pad_samples,
    random_adapter,
    random_batches,
    tiny_model,
    write_tiny_model,
)
from torch.overrides import TorchFunctionMode

SHAPES = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "head_dim": {"head_dim": 12},
    "tied": {"tied": True},
    "bias": {"attention_bias": True},
    "llama3": {"llama3_rope": True, "rope_theta": 500.0, "head_dim": 16},
    "theta": {"rope_theta": 500000.0, "num_layers": 5},
}


def base(**shape):
    model = tiny_model(**shape)
    return model, dict(model.state_dict()), OracleConfig.from_hf(model.config.to_dict())


def tokens(batch=2, length=40, seed=3):
    return torch.randint(3, 320, (batch, length), generator=torch.Generator().manual_seed(seed))


def largest_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ------------------------------------------------------------------------------------------------ the forward pass


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_base_logits_equal_transformers(shape):
    model, weights, config = base(**SHAPES[shape])
    theirs = model(tokens()).logits
    assert theirs.std() > 1  # far from uniform, so that a fault shows
    assert largest_error(oracle_logits(weights, config, None, tokens()), theirs) < 1e-5


class Wide(TorchFunctionMode):
    """Keeps what transformers rounds from fp64 to fp32: in norms and in the softmax."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if function is torch.Tensor.float:
                return args[0]
            if function is torch.Tensor.to:
                args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", FAMILY_MODELS)
@torch.no_grad()
def test_logits_of_every_family_equal_transformers_in_fp64(tmp_path: Path, name: str) -> None:
    """Rows are longer than the windows; with positions that do not begin at 0."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, **{**FAMILY_MODELS[name], "num_layers": 5})
    config = OracleConfig.from_folder(folder)
    assert config.window < 10 and (not config.window or any(config.windowed))
    model, weights = hf_model(folder, torch.float64, attn_implementation="eager"), load_weights(folder, torch.float64)
    for place, theirs in model.named_buffers():
        if place.endswith("inv_freq") and "vision" not in place:  # one rounding in fp32 is 1e-8 of the logits
            rope = config.window_rope if "sliding" in place and config.window_rope else None
            theta, scaling = rope or (config.rope_theta, config.rope_scaling)
            frequencies = rope_frequencies(theta, int(config.head_dim * config.rotary_share), scaling)
            torch.testing.assert_close(theirs, frequencies, rtol=2e-7, atol=0)
            theirs.copy_(frequencies)
    places = torch.arange(40) + 3
    with Wide():
        theirs = model(tokens(), position_ids=places.expand(2, 40)).logits
    assert theirs.std() > 0.8 and theirs.dtype == torch.float64
    ours = oracle_logits(weights, config, None, tokens(), positions=places.expand(2, 40))
    assert largest_error(ours, theirs) < 1e-12
    held = text_weights(model.state_dict(), config)  # the names in memory differ from those in the file
    assert held.keys() - {"lm_head.weight"} == weights.keys() - {"lm_head.weight"}
    assert all(torch.equal(held[key], weight) for key, weight in weights.items())


@torch.no_grad()
def test_base_logits_in_fp64_and_bf16_are_near_transformers():
    model, weights, config = base()
    fp64 = oracle_logits(cast_weights(weights, torch.float64), config, None, tokens())
    assert fp64.dtype == torch.float64
    assert largest_error(fp64, model.double()(tokens()).logits) < 1e-6  # transformers keeps norms in fp32
    bf16 = oracle_logits(cast_weights(weights, torch.bfloat16), config, None, tokens())
    assert bf16.dtype == torch.bfloat16
    assert largest_error(bf16.double(), fp64) < 0.1


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "short_factor": [1.0, 1.5, 3.0, 8.0], "long_factor": [9.0] * 4,
         "original_max_position_embeddings": 64, "factor": 4.0},
    ],
)  # fmt: skip
def test_other_frequencies_are_those_of_transformers(rope):
    model, _, config = base(head_dim=8, max_positions=256, rope=rope)
    theirs = model.model.rotary_emb
    ours = rope_frequencies(config.rope_theta, 8, config.rope_scaling)
    torch.testing.assert_close(ours, theirs.inv_freq, rtol=1e-6, atol=0)
    assert rope_amplitude(config.rope_scaling, 256) == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_llama3_frequencies_cover_all_three_cases():
    _, _, config = base(**SHAPES["llama3"])
    plain, ours = (rope_frequencies(config.rope_theta, config.head_dim, s) for s in (None, config.rope_scaling))
    ratio = (plain / ours).round(decimals=3)
    assert (ratio == 1).any() and (ratio == 8).any() and ((ratio > 1) & (ratio < 8)).any()


def test_config_reads_both_styles_of_rope():
    common = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = OracleConfig.from_hf(common | {"rope_theta": 5e5, "rope_scaling": llama3 | {"rope_type": "llama3"}})
    new = OracleConfig.from_hf(common | {"rope_parameters": llama3 | {"rope_type": "llama3", "rope_theta": 5e5}})
    assert new.rope_scaling == {**old.rope_scaling, "rope_theta": 5e5} and old.rope_scaling["factor"] == 8.0
    assert old.rope_theta == new.rope_theta == 5e5 and old.num_kv_heads == 2 and old.head_dim == 4
    assert OracleConfig.from_hf(common | {"rope_scaling": None}).rope_theta == 10000.0


# ----------------------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("shape", ["gqa", "head_dim", "bias"])
@pytest.mark.parametrize("method", TRAINED_TENSORS)
@torch.no_grad()
def test_update_equals_transformers_with_merged_weights(method, shape):
    model, _, config = base(**SHAPES[shape])
    adapter = random_adapter(method, config, alpha=6.0)
    for name in sorted({"u", "v"} - set(TRAINED_TENSORS[method])):  # what the method keeps at 1 is applied, too
        adapter.tensors[name].uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(ord(name)))
    before = model(tokens()).logits
    for i in range(config.num_layers):  # written out here, beside the oracle's own merged_weights
        a, b = (adapter.A[i], adapter.B[i]) if method == "lora" else (adapter.A, adapter.B)
        delta = 6.0 / 4 * torch.diag(adapter.v[i]) @ b @ torch.diag(adapter.u[i]) @ a
        attention = model.model.layers[i].self_attn
        q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention.q_proj.weight += delta[:q]
        attention.k_proj.weight += delta[q : q + k]
        attention.v_proj.weight += delta[q + k :]
    theirs = model(tokens()).logits
    base_weights = dict(tiny_model(**SHAPES[shape]).state_dict())
    assert largest_error(theirs, before) > 0.05
    assert largest_error(oracle_logits(base_weights, config, adapter, tokens()), theirs) < 1e-5
    merged = merged_weights(base_weights, config, adapter)
    assert largest_error(oracle_logits(merged, config, None, tokens()), theirs) < 1e-5


@pytest.mark.parametrize("method", ["lora", "tl6"])
@torch.no_grad()
def test_layers_are_one_based_and_in_the_order_given(method):
    _, weights, config = base(num_layers=5)
    adapter = random_adapter(method, config, layers=(4, 1))
    merged = merged_weights(weights, config, adapter)
    changed = {name for name in weights if not torch.equal(weights[name], merged[name])}
    wanted = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 3) for p in "qkv"}
    assert changed == wanted
    a = adapter.A[0] if method == "lora" else adapter.A
    b = adapter.B[0] if method == "lora" else adapter.B
    q_delta = (adapter.v[0][:, None] * b * adapter.u[0] @ a)[: config.q_rows]
    name = "model.layers.3.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[name] - weights[name], q_delta, rtol=1e-4, atol=1e-5)
    assert (
        largest_error(oracle_logits(weights, config, adapter, tokens()), oracle_logits(merged, config, None, tokens()))
        < 1e-5
    )


# ---------------------------------------------------------------------------------------- loss, gradients, training


@torch.no_grad()
def test_loss_is_the_mean_over_all_supervised_tokens():
    model, weights, config = base()
    (samples,) = random_batches(1)
    counts = [part.num_supervised for part in samples]
    assert counts[0] > 3 * counts[1] and counts[1] == 1 and counts[2] == 0
    total = 0.0
    for part in samples:
        log_p = model(part.input_ids).logits[0].log_softmax(-1)
        total -= sum(log_p[t, label].item() for t, label in enumerate(part.labels[0].tolist()) if label != -100)
    wanted = total / sum(counts)
    assert oracle_loss(weights, config, None, samples).item() == pytest.approx(wanted, rel=1e-5)
    for cut in ([pad_samples(samples)], [pad_samples(samples[:3], multiple=8), samples[3]], [pack_samples(samples)]):
        assert oracle_loss(weights, config, None, cut).item() == pytest.approx(wanted, rel=1e-5)
    # transformers shifts labels by itself: ours are already shifted, so hand it the tokens of one full sample
    full = samples[0]
    theirs = model(full.input_ids, labels=full.input_ids).loss.item()
    assert oracle_loss(weights, config, None, [full]).item() == pytest.approx(theirs, rel=1e-5)
    with pytest.raises(ValueError, match="no supervised token"):
        oracle_loss(weights, config, None, [samples[2]])


def test_packed_samples_have_the_gradients_of_each_alone():
    """All tests that compare a run with the oracle's let it pack: one document may leave no trace in another."""
    _, weights, config = base()
    weights = cast_weights(weights, torch.float64)
    adapter = random_adapter("tl6", config, alpha=6.0, dtype=torch.float64)
    (samples,) = random_batches(1)
    loss, gradients = oracle_gradients(weights, config, adapter, samples)
    packed_loss, packed = oracle_gradients(weights, config, adapter, [pack_samples(samples)])
    assert packed_loss == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        assert (packed[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_gradients_by_finite_differences_in_fp64():
    _, weights, config = base()
    weights = cast_weights(weights, torch.float64)
    adapter = random_adapter("tl6", config, alpha=6.0, layers=(1, 3), dtype=torch.float64, targets=ALL_TARGETS)
    (samples,) = random_batches(1)
    _, gradients = oracle_gradients(weights, config, adapter, samples)
    generator = torch.Generator().manual_seed(0)
    for name, gradient in gradients.items():
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        moved = [
            oracle_loss(weights, config, adapter.with_tensors(**{name: adapter.tensors[name] + h * direction}), samples)
            for h in (1e-5, -1e-5)
        ]
        slope = (moved[0] - moved[1]).item() / 2e-5
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5), name


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("method", ["lora", "tl4", "tl6"])
def test_training_equals_torch_optim(method, name):
    _, weights, config = base()
    weights = cast_weights(weights, torch.float64)
    adapter = random_adapter(method, config, dtype=torch.float64)
    steps = random_batches(6)
    rate = 0.02
    run = oracle_train(
        weights,
        config,
        adapter,
        steps,
        learning_rate=rate,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        optimizer=name,
        keep_gradients=True,
    )

    leaves = adapter.leaves()
    trained = [leaves.tensors[tensor] for tensor in leaves.trained]
    if name == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.1)
    else:  # torch's SGD adds decay to the gradient; after clipping that is the decoupled decay
        optimizer = torch.optim.SGD(trained, lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (s + 1) / 2 if s < 2 else 0.5 * (1 + math.cos(math.pi * (s - 2) / 4)),
    )
    for i, samples in enumerate(steps):
        loss = oracle_loss(weights, config, leaves, samples)
        optimizer.zero_grad()
        loss.backward()
        for tensor, parameter in zip(leaves.trained, trained, strict=True):
            torch.testing.assert_close(run.gradients[i][tensor], parameter.grad, rtol=1e-7, atol=1e-10)
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        assert run.losses[i] == pytest.approx(loss.item(), rel=1e-9)
        assert run.grad_norms[i] == pytest.approx(norm.item(), rel=1e-7)
        assert run.learning_rates[i] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(run.grad_norms) > 0.5  # clipping was at work
    for tensor in ("A", "B", "u", "v"):
        torch.testing.assert_close(run.adapter.tensors[tensor], leaves.tensors[tensor].detach(), rtol=1e-7, atol=1e-9)
        moved = not torch.equal(run.adapter.tensors[tensor], adapter.tensors[tensor])
        assert moved == (tensor in TRAINED_TENSORS[method])


def test_schedule_by_hand():
    def rate(step):
        return oracle_learning_rate(step, learning_rate=1e-4, warmup_steps=50, max_steps=2000)

    assert rate(0) == pytest.approx(1e-4 / 50)
    assert rate(24) == pytest.approx(5e-5)
    assert rate(49) == rate(50) == pytest.approx(1e-4)
    assert rate(50 + 650) == pytest.approx(0.75e-4)  # a third of the cosine: (1 + cos 60) / 2
    assert rate(50 + 975) == pytest.approx(0.5e-4)
    assert rate(1999) < 1e-9 and rate(2000) == rate(5000) == 0
    assert oracle_learning_rate(0, learning_rate=3.0, warmup_steps=0, max_steps=4) == 3.0


# ------------------------------------------------------------------------------------------- adapters of any targets

TOKENS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(3))
TARGETS = {**{name: (name,) for name in ALL_TARGETS[1:]}, "all": ALL_TARGETS}
MODULES = {
    "qkv": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    "o_proj": {"self_attn.o_proj"},
    "gate_up": {"mlp.gate_proj", "mlp.up_proj"},
    "down_proj": {"mlp.down_proj"},
}


@pytest.mark.parametrize(
    "shape", ["llama dynamic", "qwen2", "qwen3", "phi3", "stablelm", "smollm3", "olmo2", "gemma2", "glm4"]
)
@pytest.mark.parametrize("targets", TARGETS)
@torch.no_grad()
def test_logits_are_those_of_the_merged_weights_for_every_target(tmp_path: Path, targets: str, shape: str) -> None:
    """In fp64, on the layers given; what is not a target keeps its bits."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, **FAMILY_MODELS[shape])
    weights, config = load_weights(folder, torch.float64), OracleConfig.from_folder(folder)
    assert len({config.hidden_size, config.intermediate_size, config.qkv_rows}) == 3
    layers = (1, config.num_layers)
    for method in ("lora", "tl6"):
        adapter = random_adapter(
            method, config, alpha=6.0, layers=layers, dtype=torch.float64, targets=TARGETS[targets]
        )
        merged = merged_weights(weights, config, adapter)
        names = {module for target in TARGETS[targets] for module in MODULES[target]}
        wanted = {f"model.layers.{layer - 1}.{module}.weight" for layer in layers for module in names}
        assert {name for name in weights if not torch.equal(weights[name], merged[name])} == wanted
        logits = oracle_logits(weights, config, adapter, TOKENS)
        assert largest_error(logits, oracle_logits(weights, config, None, TOKENS)) > 0.05
        assert largest_error(logits, oracle_logits(merged, config, None, TOKENS)) < 1e-12


@pytest.mark.parametrize("method", ["lora", "tl6"])
@torch.no_grad()
def test_logits_with_every_target_are_those_of_peft(method: str) -> None:
    """PEFT's LoRA of each module with A' = diag(u) A, which a target's modules share, and its rows of diag(v) B."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model(head_dim=12)
    weights, config = dict(model.state_dict()), OracleConfig.from_hf(model.config.to_dict())
    adapter = random_adapter(method, config, alpha=6.0, targets=ALL_TARGETS)
    plain = oracle_logits(weights, config, None, TOKENS)
    theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=6.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    q, kv, f = 4 * 12, 2 * 12, 48
    cuts = {  # of each module's rows among its target's
        "self_attn": {"q_proj": ("", 0, q), "k_proj": ("", q, kv), "v_proj": ("", q + kv, kv)}
        | {"o_proj": ("o_proj.", 0, 32)},
        "mlp": {"gate_proj": ("gate_up.", 0, f), "up_proj": ("gate_up.", f, f), "down_proj": ("down_proj.", 0, 32)},
    }
    filled = 0
    for i, layer in enumerate(theirs.base_model.model.model.layers):
        for part, modules in cuts.items():
            for name, (prefix, first, rows) in modules.items():
                a, b, u, v = (adapter.tensors[f"{prefix}{factor}"] for factor in "ABuv")
                a, b = (a[i], b[i]) if method == "lora" else (a, b)
                module = getattr(getattr(layer, part), name)
                module.lora_A["default"].weight.copy_(torch.diag(u[i]) @ a)
                module.lora_B["default"].weight.copy_((torch.diag(v[i]) @ b)[first : first + rows])
                filled += 2
    assert filled == sum("lora_" in name for name, _ in theirs.named_parameters()) == 7 * 2 * config.num_layers
    ours = oracle_logits(weights, config, adapter, TOKENS)
    assert largest_error(ours, plain) > 0.05
    assert largest_error(ours, theirs(TOKENS).logits) < 1e-5
