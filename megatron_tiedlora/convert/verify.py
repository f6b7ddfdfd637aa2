"""Do the exports compute what the adapter computes? Logits in fp32 of base + adapter, merged folder and PEFT adapter."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.checkpoint.base_weights import open_weights, weight_map
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, read_json_object
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.errors import UserError

# Of the largest logit, in fp32 arithmetic. Weights stored in 16 bits differ by their rounding, 2^-8 or 2^-11 a weight,
# which comes to a few percent of the largest logit over a deep model.
TOLERANCE_FP32 = 1e-4
TOLERANCE_HALF = 5e-2


@dataclass(frozen=True)
class LogitComparison:
    """How far logits stand from the native adapter's.

    Attributes:
        largest, mean: of |difference|, as a share of the largest |logit|.
        divergence: mean KL(native || other), in nats a position.
        agreement: share of positions with the same most likely token.
        tolerance: the bound on `largest`, or None where a difference is wanted (the plain base).
    """

    name: str
    largest: float
    mean: float
    divergence: float
    agreement: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Within tolerance; for the plain base: different at all."""
        return self.largest > 0 if self.tolerance is None else self.largest <= self.tolerance


def compare_logits(name: str, native: torch.Tensor, other: torch.Tensor, tolerance: float | None) -> LogitComparison:
    """Compare two sets of logits (b, s, V)."""
    scale = native.abs().max().item()
    difference = (native - other).abs()
    log_p, log_q = native.log_softmax(-1), other.log_softmax(-1)
    return LogitComparison(
        name,
        largest=difference.max().item() / scale,
        mean=difference.mean().item() / scale,
        divergence=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        agreement=(native.argmax(-1) == other.argmax(-1)).float().mean().item(),
        tolerance=tolerance,
    )


def probe_tokens(vocab_size: int, *, batch: int = 2, length: int = 48, seed: int = 0) -> torch.Tensor:
    """Seeded token ids (batch, length): equality must hold on any input, so the input need not be text."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def verify_export(
    source: ModelSource, adapter: NativeAdapter, *, merged: Path | None = None, peft: Path | None = None
) -> list[LogitComparison]:
    """Compare the plain base, the merged folder and the PEFT adapter with base + native adapter, all in fp32.

    Raises:
        UserError: a folder that does not load, or PEFT is asked for and not installed.
    """
    from transformers import AutoModelForCausalLM

    tokens = probe_tokens(source.config.vocab_size)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        native = load_model(source, adapter, dtype=torch.float32)(tokens, positions)
        plain = load_model(source, None, dtype=torch.float32)(tokens, positions)
        results = [compare_logits("base without adapter", native, plain, None)]
        if merged is not None:
            read_json_object(merged / "config.json", kind="a merged Hugging Face folder")
            model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
            bound = TOLERANCE_FP32 if _stored_in_fp32(merged) else TOLERANCE_HALF
            results.append(compare_logits("merged, in transformers", native, model(tokens).logits, bound))
            del model
        if peft is not None:
            logits = _peft_logits(source, peft, tokens)
            results.append(compare_logits("PEFT adapter, in peft", native, logits, TOLERANCE_FP32))
    return results


def _peft_logits(source: ModelSource, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    read_json_object(folder / "adapter_config.json", kind="a PEFT adapter folder")
    if importlib.util.find_spec("peft") is None:
        raise UserError("checking a PEFT adapter needs peft; run `pip install peft`")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(source.weights_folder(), dtype=torch.float32)
    logits: torch.Tensor = PeftModel.from_pretrained(base, folder)(tokens).logits
    return logits


def _stored_in_fp32(folder: Path) -> bool:
    file = next(iter(weight_map(folder).values()))
    with open_weights(file) as reader:
        return all(reader.get_slice(name).get_dtype() in ("F32", "F64") for name in reader.keys())


def format_comparisons(results: list[LogitComparison]) -> str:
    """A table of comparisons, one a line under a heading."""
    lines = [
        f"{'logits against base + adapter':<26} {'max diff':>10} {'mean diff':>10} {'KL':>10} {'top-1':>7}  verdict"
    ]
    for row in results:
        verdict = (
            ("ok" if row.passed else "FAILED")
            if row.tolerance is not None
            else ("differs, as it should" if row.passed else "FAILED: the adapter changes nothing")
        )
        lines.append(
            f"{row.name:<26} {row.largest:>10.1e} {row.mean:>10.1e} {row.divergence:>10.1e} {row.agreement:>7.1%}  {verdict}"
        )
    return "\n".join(lines)
