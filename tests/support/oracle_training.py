"""The oracle's training: token-weighted loss, gradients, schedule, and AdamW and SGD written out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from support.oracle import IGNORED_LABEL, Drop, OracleAdapter, OracleConfig, _wide, oracle_logits

# ---------------------------------------------------------------------------------------------------------------------
# The loss


@dataclass(frozen=True)
class OracleBatch:
    """Some sequences of one length, all (B, S). A global batch is a list of these, in any cut.

    `labels[b, t]` is the target of position t, that is, ALREADY shifted (the token at t + 1), or -100 for none.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    documents: Tensor | None = None
    drops: Sequence[Drop] | None = None
    objective: str | None = None  # a key of SETTINGS; None: the cross entropy
    loss_inputs: Tensor | None = None  # (2, B, S), numbers of each label

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORED_LABEL).sum())


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of the supervised positions, (N,), in max(fp32, dtype). Labels already shifted."""
    supervised = labels != IGNORED_LABEL
    chosen = logits[supervised].to(_wide(logits.dtype))
    targets = labels[supervised].long()
    return chosen.logsumexp(dim=-1) - chosen[torch.arange(len(targets)), targets]


SETTINGS: Mapping[str, Mapping[str, float]] = {  # of the losses of tokens, none the package's default
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.375, "clip_high_threshold": 2.5},
    "cispo": {"clip_low_threshold": 0.625, "clip_high_threshold": 1.5},
    "dro": {"beta": 0.3},
}


def objective_losses(name: str, logprobs: Tensor, inputs: Tensor, settings: Mapping[str, float]) -> Tensor:
    """Losses of tokens, (N,), from their log-probabilities and their numbers, (2, N): weights, or q and advantages."""
    if name == "cross_entropy":
        return inputs[0] * -logprobs
    sampled, advantages = inputs
    ratio = torch.exp(logprobs) / torch.exp(sampled)
    low, high = settings.get("clip_low_threshold", 0.0), settings.get("clip_high_threshold", math.inf)
    if name == "importance_sampling":
        return -ratio * advantages
    if name == "ppo":  # a good token gains nothing above `high`, and a bad one nothing below `low`
        active = torch.where(advantages > 0, ratio < high, ratio > low)
        bound = torch.where(advantages > 0, torch.full_like(ratio, high), torch.full_like(ratio, low))
        return -advantages * torch.where(active, ratio, bound)
    if name == "cispo":
        with torch.no_grad():
            factor = torch.where(ratio < low, low, torch.where(ratio > high, high, ratio)) * advantages
        return -factor * logprobs
    assert name == "dro"
    return settings["beta"] / 2 * (logprobs - sampled) ** 2 - logprobs * advantages


def with_objective(sample: OracleBatch, objective: str | None, seed: int) -> OracleBatch:
    """The sample with a loss of tokens and their numbers: weights, or log-probabilities near the tiny models' own."""
    if objective is None:
        return sample
    drawn = torch.Generator().manual_seed(seed + 3)  # ppo clips no shard's tokens altogether
    numbers = torch.randn(2, *sample.labels.shape, generator=drawn, dtype=torch.float64)
    if objective != "cross_entropy":
        numbers[0] = 0.5 * numbers[0] - 5.8
    return replace(sample, objective=objective, loss_inputs=numbers)


def oracle_loss(
    weights: Mapping[str, Tensor],
    config: OracleConfig,
    adapter: OracleAdapter | None,
    global_batch: Sequence[OracleBatch],
) -> Tensor:
    """Sum of token losses over all parts / number of supervised tokens in all parts. Scalar.

    Raises:
        ValueError: no position of the global batch is supervised.
    """
    num_supervised = sum(part.num_supervised for part in global_batch)
    if num_supervised == 0:
        raise ValueError("oracle: no supervised token in the global batch")
    total = torch.zeros((), dtype=_wide(weights["model.norm.weight"].dtype))
    for part in global_batch:
        logits = oracle_logits(
            weights,
            config,
            adapter,
            part.input_ids,
            part.attention_mask,
            part.positions,
            documents=part.documents,
            drops=part.drops,
        )
        losses = token_losses(logits, part.labels)
        if part.objective is not None:
            inputs = part.loss_inputs[:, part.labels != IGNORED_LABEL].to(losses.dtype)
            losses = objective_losses(part.objective, -losses, inputs, SETTINGS[part.objective])
        total = total + losses.sum()
    return total / num_supervised


def oracle_gradients(
    weights: Mapping[str, Tensor],
    config: OracleConfig,
    adapter: OracleAdapter,
    global_batch: Sequence[OracleBatch],
) -> tuple[float, dict[str, Tensor]]:
    """Loss, and the gradient of each trained tensor (in that tensor's dtype and full shape) by name."""
    leaves = adapter.leaves()
    loss = oracle_loss(weights, config, leaves, global_batch)
    gradients = torch.autograd.grad(loss, [leaves.tensors[name] for name in leaves.trained])
    return loss.item(), dict(zip(leaves.trained, gradients, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def oracle_learning_rate(step: int, *, learning_rate: float, warmup_steps: int, max_steps: int) -> float:
    """Rate of the 0-based `step`: lr / warmup, 2 lr / warmup, ..., lr, then a cosine that reaches 0 at max_steps."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if step >= max_steps:
        return 0.0
    return learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (max_steps - warmup_steps)))


@dataclass(frozen=True)
class OracleRun:
    """What a training run leaves; the lists have one entry a step, read before that step's update."""

    losses: list[float]
    grad_norms: list[float]  # before clipping
    learning_rates: list[float]
    adapter: OracleAdapter  # after the last step
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # before clipping; only with keep_gradients


def oracle_train(
    weights: Mapping[str, Tensor],
    config: OracleConfig,
    adapter: OracleAdapter,
    steps: Sequence[Sequence[OracleBatch]],
    *,
    learning_rate: float,
    warmup_steps: int = 0,
    max_steps: int | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float = 0.0,
    optimizer: str = "adamw",
    rate_factors: Mapping[str, float] | None = None,
    keep_gradients: bool = False,
) -> OracleRun:
    """One update per entry of `steps`, each a global batch; the adapter handed in is not changed.

    Args:
        max_steps: end of the cosine; len(steps) by default.
        weight_decay: decoupled (p -= lr * decay * p, before the update), on every trained tensor, u and v included.
        max_grad_norm: gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)); 0 switches clipping off.
        optimizer: "adamw" or "sgd" (p -= lr * g after the same decay; its errors of scale are not hidden by Adam).
        rate_factors: multiples of the rate by the last letter of a tensor's name; 1 for others.
    """
    assert optimizer in ("adamw", "sgd"), optimizer
    adapter = adapter.leaves()
    parameters = {name: adapter.tensors[name] for name in adapter.trained}
    mean, square = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    betas = 0.9, 0.999
    run = OracleRun([], [], [], adapter)
    for step, global_batch in enumerate(steps):
        loss, gradients = oracle_gradients(weights, config, adapter, global_batch)
        # Each named tensor once, whatever number of layers uses it.
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))
        rate = oracle_learning_rate(
            step, learning_rate=learning_rate, warmup_steps=warmup_steps, max_steps=max_steps or len(steps)
        )
        run.losses.append(loss)
        run.grad_norms.append(norm)
        run.learning_rates.append(rate)
        if keep_gradients:
            run.gradients.append({name: gradient.clone() for name, gradient in gradients.items()})
        clip = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm > 0 else 1.0

        updated = {}
        for name, parameter in parameters.items():
            gradient = gradients[name] * clip
            own = rate * (rate_factors or {}).get(name[-1], 1.0)
            value = parameter.detach() * (1 - own * weight_decay)
            if optimizer == "sgd":
                updated[name] = value - own * gradient
                continue
            mean[name] = betas[0] * mean[name] + (1 - betas[0]) * gradient
            square[name] = betas[1] * square[name] + (1 - betas[1]) * gradient**2
            mean_hat = mean[name] / (1 - betas[0] ** (step + 1))
            square_hat = square[name] / (1 - betas[1] ** (step + 1))
            updated[name] = value - own * mean_hat / (square_hat.sqrt() + 1e-8)
        adapter = adapter.with_tensors(**updated)
        parameters = updated
    return replace(run, adapter=adapter.with_tensors(**{n: tensor.detach() for n, tensor in adapter.tensors.items()}))
