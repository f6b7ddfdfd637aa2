"""The oracle judges everything else, so it is judged first: against transformers, torch.optim and numbers by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from oracle import OracleConfig, cast_weights, load_weights, merged_weights, oracle_logits
from oracle_adapter import ALL_TARGETS, TRAINED_TENSORS, oracle_trainable_count
from oracle_rope import rope_amplitude, rope_frequencies
from oracle_training import OracleBatch, oracle_gradients, oracle_learning_rate, oracle_loss, oracle_train
from tiny_models import pack_samples, pad_samples, random_adapter, random_batches, tiny_model, write_tiny_model

SHAPES = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "head_dim": {"head_dim": 12},
    "tied": {"tied": True},
    "bias": {"attention_bias": True},
    "llama3": {"llama3_rope": True, "rope_theta": 500.0, "head_dim": 16},
    "theta": {"rope_theta": 500000.0, "num_layers": 5},
}
METHODS = tuple(TRAINED_TENSORS)


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


@torch.no_grad()
def test_base_logits_in_fp64_and_bf16_are_near_transformers():
    model, weights, config = base()
    fp64 = oracle_logits(cast_weights(weights, torch.float64), config, None, tokens())
    assert fp64.dtype == torch.float64
    assert largest_error(fp64, model.double()(tokens()).logits) < 1e-6  # transformers keeps norms in fp32
    bf16 = oracle_logits(cast_weights(weights, torch.bfloat16), config, None, tokens())
    assert bf16.dtype == torch.bfloat16
    assert largest_error(bf16.double(), fp64) < 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_never_looked_at(side):
    model, weights, config = base()
    (samples,) = random_batches(1)
    padded = pad_samples(samples, multiple=8, side=side)
    ours = oracle_logits(weights, config, None, padded.input_ids, padded.attention_mask)
    theirs = model(padded.input_ids, attention_mask=padded.attention_mask).logits
    real = padded.attention_mask.bool()
    assert largest_error(ours[real], theirs[real]) < 1e-5
    alone = torch.cat([oracle_logits(weights, config, None, part.input_ids)[0] for part in samples])
    assert largest_error(ours[real], alone) < 1e-5


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    _, weights, config = base()
    (samples,) = random_batches(1)
    packed = pack_samples(samples)
    ours = oracle_logits(
        weights, config, None, packed.input_ids, positions=packed.positions, documents=packed.documents
    )
    alone = torch.cat([oracle_logits(weights, config, None, part.input_ids)[0] for part in samples])
    assert largest_error(ours[0], alone) < 1e-5


def test_llama3_frequencies_cover_all_three_cases():
    model, _, config = base(**SHAPES["llama3"])
    plain, ours = (rope_frequencies(config.rope_theta, config.head_dim, s) for s in (None, config.rope_scaling))
    torch.testing.assert_close(ours, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    ratio = (plain / ours).round(decimals=3)
    assert (ratio == 1).any() and (ratio == 8).any() and ((ratio > 1) & (ratio < 8)).any()


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
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_update_equals_transformers_with_merged_weights(method, shape):
    model, _, config = base(**SHAPES[shape])
    adapter = random_adapter(method, config, alpha=6.0, scale_frozen_vectors=True)
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


SIZES_7B = {"qkv": (4096, 12288), "o_proj": (4096, 4096), "gate_up": (4096, 22016), "down_proj": (11008, 4096)}
SIZES_70B = {"qkv": (8192, 10240), "o_proj": (8192, 8192), "gate_up": (8192, 57344), "down_proj": (28672, 8192)}


def count_of(method, sizes, *, rank, num_layers):
    return sum(
        oracle_trainable_count(method, rank=rank, hidden_size=d, qkv_rows=o, num_layers=num_layers)
        for d, o in sizes.values()
    )


@pytest.mark.parametrize("targets", [("qkv",), ALL_TARGETS])
@pytest.mark.parametrize("method", METHODS)
def test_counts_match_the_tensors_and_the_gradients(method, targets):
    _, weights, config = base()
    adapter = random_adapter(method, config, rank=3, targets=targets)
    sizes = {"qkv": (32, 64), "o_proj": (32, 32), "gate_up": (32, 96), "down_proj": (48, 32)}
    sizes = {name: sizes[name] for name in targets}
    _, gradients = oracle_gradients(weights, config, adapter, random_batches(1)[0])
    assert sum(gradient.numel() for gradient in gradients.values()) == count_of(method, sizes, rank=3, num_layers=3)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_counts_of_the_reference():
    seven = dict(rank=8, hidden_size=4096, qkv_rows=12288, num_layers=32)
    wanted = dict(lora=4194304, vera=393472, tl1=32768, tl2=426240, tl3=98304, tl4=98560, tl5=131072, tl6=524544)
    assert {method: oracle_trainable_count(method, **seven) for method in METHODS} == wanted
    seventy = dict(rank=8, hidden_size=8192, qkv_rows=10240, num_layers=80)
    wanted = dict(lora=11796480, tl5=147456, tl6=967296)
    assert {method: oracle_trainable_count(method, **seventy) for method in wanted} == wanted
    wanted = dict(lora=16842752, tl5=526336, tl6=1887232)
    assert {method: count_of(method, SIZES_7B, rank=8, num_layers=32) for method in wanted} == wanted
    wanted = dict(lora=87818240, tl5=1097728, tl6=7817728)
    assert {method: count_of(method, SIZES_70B, rank=8, num_layers=80) for method in wanted} == wanted


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


def test_training_lowers_the_loss_with_a_bf16_base_and_fp32_adapter():
    _, weights, config = base()
    weights = cast_weights(weights, torch.bfloat16)
    adapter = random_adapter("tl6", config)
    run = oracle_train(weights, config, adapter, random_batches(1) * 8, learning_rate=0.01, update_dtype=torch.float32)
    assert run.adapter.A.dtype == run.first_moments["A"].dtype == torch.float32
    assert run.losses[-1] < run.losses[0] - 0.1


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


# ------------------------------------------------------------------------------------------------------ tiny models


@torch.no_grad()
def test_written_checkpoint_is_read_by_transformers_and_by_the_oracle(tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_tiny_model(tmp_path / "tiny", max_shard_size="20KB", tied=True, dtype=torch.bfloat16)
    assert (folder / "model.safetensors.index.json").exists() and len(list(folder.glob("*.safetensors"))) > 2
    weights = load_weights(folder)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values()) and "lm_head.weight" not in weights
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = oracle_logits(cast_weights(weights, torch.float32), OracleConfig.from_folder(folder), None, tokens())
    assert largest_error(ours, theirs(tokens()).logits) < 1e-5

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Question: 2 + 3 =\n  5, naïve  ✓ "
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2 and len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_random_things_are_reproducible():
    _, _, config = base()
    for method in METHODS:
        first, second = (random_adapter(method, config, seed=5) for _ in range(2))
        assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
        assert all(tensor.abs().max() > 0 for tensor in first.tensors.values())
        more = random_adapter(method, config, seed=5, targets=ALL_TARGETS[::-1])
        assert more.targets == ALL_TARGETS and len(more.tensors) == 4 * len(first.tensors)
        assert all(torch.equal(more.tensors[name], tensor) for name, tensor in first.tensors.items())
    batches: list[list[OracleBatch]] = random_batches(3, samples_per_step=6, seed=1)
    again = random_batches(3, samples_per_step=6, seed=1)
    assert all(
        torch.equal(a.input_ids, b.input_ids)
        for x, y in zip(batches, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert len(batches) == 3 and all(len(step) == 6 for step in batches)
