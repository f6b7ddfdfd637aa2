"""Checks that exports compute what the adapter computes: fp32 logits of base + adapter, merged folder and PEFT adapter.

A merged folder in 16 bits cannot have the adapter's logits. So it is compared with base + adapter rounded to the same
dtype, where the difference must vanish. The difference from the unrounded adapter is only shown.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from megatron_tiedlora.base.errors import UserError, printable
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, open_weights, weight_map
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES
from megatron_tiedlora.convert.import_peft import load_peft_adapter
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.hf_config import read_hf_config
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import weight_rules

_PROBED = (2, 48)  # rows and tokens of the input
TOLERANCE = 1e-4  # as a share of the largest logit, in fp32 arithmetic

Wanted = Literal["equal", "different", "rounded"]


@dataclass(frozen=True)
class LogitComparison:
    """How much logits differ from the native adapter's.

    Attributes:
        largest, mean: maximum and mean of |difference|, as a share of the largest |logit|.
        divergence: mean KL(native || other), in nats per position.
        agreement: share of positions with the same most likely token.
        wanted: "equal" within TOLERANCE, "different" at all, or "rounded": only shown, as the next row is judged.
    """

    name: str
    largest: float
    mean: float
    divergence: float
    agreement: float
    wanted: Wanted

    @property
    def passed(self) -> bool:
        """Whether the difference is as wanted; NaN never is."""
        if self.wanted == "different":
            return self.largest > 0
        return self.largest <= (TOLERANCE if self.wanted == "equal" else float("inf"))

    @property
    def verdict(self) -> str:
        """The last column of the table."""
        if self.wanted == "different":
            if not self.passed:
                return "FAILED: the adapter changes nothing"
            return "differs, as it should" if self.largest > TOLERANCE else "differs by less than the tolerance"
        if not self.passed:
            return f"FAILED: above {TOLERANCE:.0e}"
        return "ok" if self.wanted == "equal" else "for information"


def compare_logits(name: str, native: torch.Tensor, other: torch.Tensor, wanted: Wanted) -> LogitComparison:
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
        wanted=wanted,
    )


def verify_export(
    source: ModelSource,
    adapter: NativeAdapter,
    *,
    merged: Path | None = None,
    peft: Path | None = None,
    progress: bool = False,
) -> list[LogitComparison]:
    """Compare the plain base, the merged folder and the PEFT adapter with base + native adapter, all in fp32.

    It holds one fp32 model at a time. The caller checks whether `source` is the adapter's base.

    Raises:
        UserError: a folder does not load or has another shape, or PEFT is needed and not installed.
    """
    stored = {} if merged is None else _stored_types(source, merged)
    if peft is not None:
        _check_peft(peft, source)
    # Equality must hold for any input, so it need not be text.
    probed = (_PROBED[0], min(_PROBED[1], source.shape.limit.tokens))
    tokens = torch.randint(0, source.shape.vocab_size, probed, generator=torch.Generator().manual_seed(0))
    count = 1 + (merged is not None) + (peft is not None)
    bar = tqdm(total=count, desc="verify", unit="model", disable=not progress, leave=False)
    results, rounded = [], None
    with torch.no_grad(), bar:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        model = load_model(source, adapter, dtype=torch.float32, progress=progress)
        native = model.predict(tokens, positions)
        trained, model.adapter = model.adapter, None
        results.append(compare_logits("base without adapter", native, model.predict(tokens, positions), "different"))
        if any(dtype.itemsize < 4 for dtype in stored.values()):
            _fold_and_round(model, adapter, source, stored)
            rounded = model.predict(tokens, positions)
        del model, trained
        bar.update()
        if merged is not None:
            logits = _transformers_logits(merged, tokens)
            if rounded is None:
                results.append(compare_logits("merged, in transformers", native, logits, "equal"))
            else:
                results.append(compare_logits("merged, in transformers", native, logits, "rounded"))
                results.append(compare_logits("  against rounded weights", rounded, logits, "equal"))
            bar.update()
        if peft is not None:
            from peft import PeftModel

            with_adapter = partial(PeftModel.from_pretrained, model_id=str(peft))
            logits = _transformers_logits(source.weights_folder(), tokens, with_adapter)
            results.append(compare_logits("PEFT adapter, in peft", native, logits, "equal"))
            bar.update()
    return results


def format_comparisons(results: list[LogitComparison]) -> str:
    """A table of comparisons, one per line under a heading."""
    heading = f"{'logits against base + adapter':<30}{'max diff':>10}{'mean diff':>11}{'KL':>10}{'top-1':>8}  verdict"
    lines = [
        f"{row.name:<30}{row.largest:>10.1e}{row.mean:>11.1e}{row.divergence:>10.1e}{row.agreement:>8.1%}  "
        for row in results
    ]
    return "\n".join([heading, *(printable(line + row.verdict) for line, row in zip(lines, results, strict=True))])


def _stored_types(source: ModelSource, merged: Path) -> dict[str, torch.dtype]:
    """The dtype of every tensor of the merged folder, whose names and shapes must be the base's."""
    if shape_from_hf(read_hf_config(merged), source=str(merged / "config.json")) != source.shape:
        raise UserError(f"{merged / 'config.json'}: not the model {source.name}; give the base with --model")
    with BaseWeights(merged, source.shape) as weights:  # checks names and shapes
        names = {name for rule in weights.rules for name in rule.hf_names}
    files = weight_map(merged)
    types = {}
    for file in set(files.values()):
        with open_weights(file) as reader:
            for name in (name for name in names if files[name] == file):
                types[name] = FLOAT_TYPES[reader.get_slice(name).get_dtype()]
    return types


def _fold_and_round(
    model: Stage, adapter: NativeAdapter, source: ModelSource, stored: Mapping[str, torch.dtype]
) -> None:
    """Add the update to the fused weights, and round every weight to the dtype in the merged folder."""
    parameters = dict(model.named_parameters())
    for rule, a, b in adapter.updates(source.shape):
        parameters[rule.name].add_(b @ a)
    for rule in weight_rules(source.shape):
        blocks = parameters[rule.name].split(rule.spec.blocks, dim=rule.spec.dim or 0)
        for name, block in zip(rule.hf_names, blocks, strict=True):
            block.copy_(block.to(stored[name]))


def _check_peft(folder: Path, source: ModelSource) -> None:
    """Raise UserError if PEFT is not installed, or if this package would not read the adapter itself."""
    content = read_json_object(folder / "adapter_config.json", kind="a PEFT adapter folder")
    if "peft_type" not in content:
        raise UserError(f"{folder}: this is not a PEFT adapter; make one with tools/export_peft.py")
    load_peft_adapter(folder, source)
    if importlib.util.find_spec("peft") is None:
        raise UserError("checking a PEFT adapter needs peft; run `pip install peft`")


def _transformers_logits(
    folder: Path, tokens: torch.Tensor, wrap: Callable[[Any], Any] = lambda model: model
) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with _quiet_transformers():
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",  # ignore the config's, which may name code on the hub
            )
            model = wrap(loaded).eval()
        except Exception as error:  # of many types; whatever it is, users of transformers could not load it either
            raise UserError(f"{folder}: does not load in transformers ({first_line(error)})") from error
    logits: torch.Tensor = model(tokens).logits
    return logits


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bar for each model (ours counts models), and its warning about PEFT's calls."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
