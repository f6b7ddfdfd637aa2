"""Checks that exports compute the same as the adapter, by the bits of a merged folder and the logits of every export.

A merged folder in 16 bits cannot have the adapter's exact logits. So its logits must be equal to the logits of base +
adapter after rounding to the same dtype. The difference from the unrounded adapter is shown but not checked.

The bits are compared some rows at a time, and `layerwise_logits` computes the logits in the memory of one layer. If the
model is small, transformers and PEFT also load the exports, as users do, and compute the logits in fp32.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_tiedlora.base import installation, messages
from megatron_tiedlora.base.messages import UserError, count_text, first_line, one_line, printable, shown
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_identity import SHAPE_FIELDS, identify_shape
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, WeightFiles
from megatron_tiedlora.checkpoint.load_model import MergedWeights, Weights, layerwise_logits, row_blocks
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource, read_shape
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES
from megatron_tiedlora.convert import inputs, merge
from megatron_tiedlora.convert.open_adapter import compare_export, read_peft, stored_dtype
from megatron_tiedlora.model import hf_config, weights

_PROBED = (2, 48)  # rows of the input, and tokens per row
LARGEST_WHOLE = 8_000_000_000  # maximum bytes of a model in fp32 that transformers and PEFT load by default
RUNTIMES = {"transformers": "--merged", "peft": "--peft"}  # the values of --in, and the flag of the export they load
TOLERANCE = 1e-4  # relative to the largest logit
_MOST_LINES = 8  # largest number of listed differences
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes

Wanted = Literal["equal", "different", "rounded"]


@dataclass(frozen=True)
class BitComparison:
    """The result of a bit-by-bit comparison: what was compared, and a sentence for each tensor that differs."""

    compared: str
    differences: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the lines of the report: what was compared, the verdict, and the tensors that differ."""
        verdict = f"FAILED: {len(self.differences)} differ" if self.differences else "ok"
        shown_first = [f"  {difference}" for difference in self.differences[:_MOST_LINES]]
        left = len(self.differences) - len(shown_first)
        return [f"{self.compared}  {verdict}", *shown_first, *([f"  and {left} more"] if left else [])]


@dataclass(frozen=True)
class LogitComparison:
    """The differences between the logits of an export and the logits of the native adapter.

    Attributes:
        largest, mean: maximum and mean of |difference|, relative to the largest |logit|.
        divergence: mean KL(native || other), in nats per position.
        agreement: fraction of positions with the same most likely token.
        wanted: "equal": at most TOLERANCE; "different": more than zero; "rounded": shown, but not checked.
    """

    name: str
    largest: float
    mean: float
    divergence: float
    agreement: float
    wanted: Wanted

    @property
    def passed(self) -> bool:
        """Return whether `largest` satisfies `wanted`, which NaN never does."""
        if self.wanted == "different":
            return self.largest > 0
        return self.largest <= (TOLERANCE if self.wanted == "equal" else float("inf"))

    @property
    def verdict(self) -> str:
        """Return the text for the last column of the table."""
        if self.wanted == "different":
            if not self.passed:
                return "FAILED: the adapter changes nothing"
            return "differs, as it should" if self.largest > TOLERANCE else "differs by less than the tolerance"
        if not self.passed:
            return f"FAILED: above {TOLERANCE:.0e}"
        return "ok" if self.wanted == "equal" else "for information"


@dataclass(frozen=True)
class Verification:
    """The result of all checks.

    Attributes:
        bits: comparisons of the files of the merged folder and of a PEFT folder that this package exported.
        logits: comparisons of logits.
        notes: notes about the checks for the user.
    """

    bits: tuple[BitComparison, ...]
    logits: tuple[LogitComparison, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Return whether every check passed."""
        return not any(bits.differences for bits in self.bits) and all(row.passed for row in self.logits)

    def report(self) -> str:
        """Return the text of the report: the bit comparisons, the table of logits, and the notes."""
        bits = [line for compared in self.bits for line in compared.lines()]
        return "\n".join([*bits, format_comparisons(self.logits), *(printable(f"note: {note}") for note in self.notes)])


def choose_runtimes(
    source: ModelSource, given: str | None, *, merged: Path | None, peft: Path | None, dtype: torch.dtype
) -> tuple[tuple[str, ...], str]:
    """Return the names of the libraries in `RUNTIMES` that also load the exports, and a note if a library does not.

    Args:
        given: the value of --in. None means every library that has an export to load, if the model is small.
        dtype: the dtype of the package's own layers. The libraries compute in fp32.

    Raises:
        UserError: `given` names an unknown library, one without an export, or any library although `dtype` is bf16.
    """
    exports = {"transformers": merged, "peft": peft}
    there = tuple(name for name in RUNTIMES if exports[name] is not None)
    if given is None:
        size, kind, why = 4 * weights.num_base_parameters(source.shape), source.stored_base, ""
        if dtype != torch.float32 or not there:
            return (), ""
        if size > LARGEST_WHOLE:
            words = f"{messages.bytes_in_words(size)} in fp32; give --in {','.join(there)} to load all of it there too"
            return (), f"{source.name} takes {words}"
        if peft is not None and installation.missing_modules("peft"):
            why = "peft is not installed, so it did not load the export"
        elif peft is not None and kind is not None:
            why = f"PEFT computes a base in {kind} differently, so it did not load the export; see --in"
        return tuple(name for name in there if not why or name != "peft"), why
    names = [] if given == "none" else given.split(",")
    for name in names:
        if name not in RUNTIMES:
            raise UserError(f"--in {given}: {shown(name)} is not one of {', '.join(RUNTIMES)}, none")
        if name not in there:
            raise UserError(f"--in {given}: {name} has nothing to load; give {RUNTIMES[name]} DIR")
        if dtype != torch.float32:
            raise UserError(f"--in {given}: {name} computes in fp32, not in bf16; remove --dtype, or give --in none")
    return tuple(names), ""


def verify_export(
    source: ModelSource,
    adapter: NativeAdapter,
    *,
    merged: Path | None = None,
    peft: Path | None = None,
    dtype: torch.dtype = torch.float32,
    inside: str | None = None,
    progress: bool = False,
) -> Verification:
    """Compare the plain base, the merged folder and the PEFT adapter with base + native adapter.

    Only the libraries in `RUNTIMES` load more than one layer at a time. The caller checks that `source` is the base.

    Args:
        dtype: the dtype of the package's own layers, fp32 or bf16. A PEFT adapter is only compared in fp32.
        inside: the value of --in, see `choose_runtimes`.

    Raises:
        UserError: a folder does not load or has a different shape; PEFT is needed but not installed; or `source` is
            quantised to different values than training used, so a merge onto the trained base cannot be checked.
    """
    if peft is not None and dtype != torch.float32:
        raise UserError("--dtype bf16: a PEFT adapter is compared in fp32 only; remove --peft or --dtype")
    onto, trained = None if merged is None else merge.merged_onto(merged), adapter.base_identity.base_format
    if merged is not None and (onto is None or (source.stored is not None and source.stored.base_format != onto)):
        merge.reject_quantised(source)
    # A quantised folder already has the values that training used.
    made_onto = None if source.stored is not None else onto
    otherwise = inputs.trained_otherwise(source, adapter)
    if otherwise and made_onto is not None:
        raise UserError(f"--merged {merged}: {otherwise}")
    runtimes, note = choose_runtimes(source, inside, merged=merged, peft=peft, dtype=dtype)
    stored = {} if merged is None else _stored_types(source, merged)
    notes = [text for text in (note, otherwise and f"as trained, base in {trained}: {otherwise}") if text]
    imported = None if peft is None else read_peft(peft, source, tied=False)
    notes += () if imported is None else imported.notes
    exported = None if peft is None else compare_export(peft, source, adapter)
    if imported is not None and "peft" in runtimes and installation.missing_modules("peft"):
        raise UserError(f"checking a PEFT adapter needs peft; {installation.install_hint('peft')}")
    bits = []
    if merged is not None:
        bits.append(compare_merged(source, adapter, merged, base_format=made_onto, progress=progress))
    if exported is not None:
        bits.append(BitComparison("PEFT files, bit by bit: the adapter's export", exported))
    # The logits must be equal for any input, so random tokens are enough.
    probed = (_PROBED[0], min(_PROBED[1], source.shape.limit.tokens))
    tokens = torch.randint(0, source.shape.vocab_size, probed, generator=torch.Generator().manual_seed(0))
    rounds = any(kind.itemsize < 4 for kind in (dtype, *stored.values()))
    with ExitStack() as opened:
        base = opened.enter_context(BaseWeights(source.weights_folder(), source.shape, source.stored))
        of_peft = {} if imported is None else {"peft": imported.adapter}
        models: list[Weights] = [(base.read, {"native": adapter, "plain": None, **of_peft})]
        for name in {str(known) for known in (trained, onto) if known not in (None, source.stored_base)}:
            quantised = opened.enter_context(MergedWeights(source, None, base_format=name))
            models.append((quantised.read, {name: adapter}))
        if merged is not None:
            if rounds:
                once = opened.enter_context(MergedWeights(source, adapter, base_format=made_onto))
                models.append((lambda name, rows: once.read(name, rows).to(stored[name]), {"rounded": None}))
            written = opened.enter_context(BaseWeights(merged, source.shape))
            models.append((written.read, {"merged": None}))
        found = layerwise_logits(source.shape, models, tokens, dtype=dtype, progress=progress)
    native, rounded = found["native"], found.get("rounded")
    rows = [compare_logits("base without adapter", native, found["plain"], "different")]
    if trained is not None and trained in found:
        rows.append(compare_logits(f"as trained, base in {trained}", native, found[trained], "rounded"))
    of_merge = native if made_onto is None else found[made_onto]

    def compare_both(name: str, logits: Tensor) -> None:
        wanted: Wanted = "equal" if rounded is None else "rounded"
        rows.append(compare_logits(name, of_merge, logits, wanted))
        if rounded is not None:
            rows.append(compare_logits("  against rounded weights", rounded, logits, "equal"))

    if merged is not None:
        compare_both("merged" if onto is None else f"merged onto {onto}", found["merged"])
        if "transformers" in runtimes:
            compare_both("merged, in transformers", transformers_logits(merged, tokens, source))
    if peft is not None:
        read = found["peft"]
        exact = exported is None or stored_dtype(peft).itemsize >= 4  # for 16 bits, the bit comparison decides
        rows.append(compare_logits("PEFT adapter", native, read, "equal" if exact else "rounded"))
        if "peft" in runtimes:
            from peft import PeftModel

            wrap = partial(PeftModel.from_pretrained, model_id=str(peft))
            logits = transformers_logits(source.weights_folder(), tokens, source, wrap)
            rows.append(compare_logits("PEFT adapter, in peft", native if exact else read, logits, "equal"))
    return Verification(tuple(bits), tuple(rows), tuple(notes))


def _stored_types(source: ModelSource, merged: Path) -> dict[str, torch.dtype]:
    """Return {name: dtype} of the tensors in the merged folder. Raise UserError if the base has a different shape."""
    file = merged / "config.json"
    found = replace(source, shape=read_shape(merged, hf_config.read_hf_config(merged)))
    if found.shape != source.shape:
        here, there = (identify_shape(model, "fp32", weights_hash="") for model in (found, source))
        sizes = ((name, getattr(here, name), getattr(there, name)) for name in SHAPE_FIELDS)
        differ = [f"{name} is {size}, not {other}" for name, size, other in sizes if size != other]
        raise UserError(
            f"{file}: {', '.join(differ) or 'the config is not the same'} as in {source.name}; give the adapter's own"
            " merge, or its base with --model"
        )
    with BaseWeights(merged, source.shape) as written:  # checks names and shapes
        return {name: written.dtype(name) for name in weights.stored_shapes(written.rules)}


def compare_logits(name: str, native: Tensor, other: Tensor, wanted: Wanted) -> LogitComparison:
    """Return the differences of the logits `other` from the logits `native`, both of shape (b, s, V)."""
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


def format_comparisons(results: Sequence[LogitComparison]) -> str:
    """Return a table with a heading and one line per comparison."""
    heading = ("logits against base + adapter", "max diff", "mean diff", "KL", "top-1", "verdict")
    rows = []
    for row in results:
        numbers = [f"{number:.1e}" for number in (row.largest, row.mean, row.divergence)]
        rows.append([row.name, *numbers, f"{row.agreement:.1%}", row.verdict])
    return "\n".join(map(printable, messages.aligned_lines([heading, *rows], align="<>>>><")))


def transformers_logits(folder: Path, tokens: Tensor, source: ModelSource, wrap: Any = lambda model: model) -> Tensor:
    """Return logits (b, s, V) of `wrap` applied to the model in `folder`, which has the shape of `source`.

    Raises:
        UserError: the model does not load.
    """
    import transformers
    from transformers.utils import logging

    # Hide transformers' progress bars, because our own bar counts models, and the FutureWarnings about PEFT's calls.
    with ExitStack() as quiet:
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            quiet.callback(logging.enable_progress_bar)
        quiet.enter_context(warnings.catch_warnings(action="ignore", category=FutureWarning))
        try:
            loaded = getattr(transformers, source.auto_class).from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=source.attention_in_transformers,  # the config's own may name code on the hub
            )
            model = wrap(loaded).eval()
        except Exception as error:  # of many types; users of transformers could not load it either
            why = f"transformers cannot load it ({first_line(error)})"
            raise UserError(f"{folder}: {why}; `tiedlora verify --in none` checks without it") from error
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


# The bits of a merged folder ----------------------------------------------------------------------------------------


def compare_merged(
    source: ModelSource, adapter: NativeAdapter, merged: Path, *, base_format: str | None = None, progress: bool = False
) -> BitComparison:
    """Compare every tensor in the files of the folder `merged` with base + adapter, some rows at a time.

    A merge writes the values that `MergedWeights` reads, and this function reads the same blocks of rows again. Tensors
    that the adapter does not change must have the base's bytes, or the base's values cast once to the merge's dtype.

    Args:
        base_format: storage format of the base that the adapter was merged onto; None for the stored base.

    Raises:
        UserError: a file is missing or not complete.
    """
    differences, counts = [], {True: 0, False: 0}
    with ExitStack() as opened:
        base = opened.enter_context(MergedWeights(source, adapter, base_format=base_format))
        written = opened.enter_context(WeightFiles(merged))
        names = weights.stored_shapes(base.rules)
        dtype = _merge_dtype(base, written, names)
        tensors = [
            (file, *item)
            for file in sorted(set(written.file_of.values()))
            for item in sorted(written.header(file).entries.items(), key=lambda item: item[1]["data_offsets"])
        ]
        total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, _, entry in tensors)
        bar = opened.enter_context(progress_bar("merged files", "B", total=total, shows=progress))
        for file, name, entry in tensors:
            counts[name in base.changed] += 1
            if source.stored is None or name in base.others:
                why = _why_unlike(entry, _entry(base, name), dtype, of_model=name in names)
            else:  # its stored tensors have different sizes and dtypes than the merged ones
                why = None if name in names else "is not in the base"
            if why is None:
                like = "base + adapter" if name in base.changed else "the base"
                why = _compare_values(base, written.reader(file), name, entry, like, bar.update)
            if why is not None:
                differences.append(one_line(f"{file}: {name} {why}"))
        missing = [name for name in base.others if name not in written.file_of]
    differences += [one_line(f"{merged}: {name}, which is in the base, is missing") for name in missing]
    compared = f"{count_text(counts[True], 'tensor')} with the adapter, {counts[False]} as in the base"
    return BitComparison(f"merged files, bit by bit: {compared}", tuple(differences))


def _entry(files: WeightFiles, name: str) -> Mapping[str, Any] | None:
    """Return the tensor's entry in the header of its file; None if it is missing."""
    return files.header(files.file_of[name]).entries.get(name) if name in files.file_of else None


def _merge_dtype(base: WeightFiles, written: WeightFiles, names: Collection[str]) -> str | None:
    """Return the dtype to which a merge probably cast all tensors of `names`, or None if each kept its own."""
    found = {name: entry["dtype"] for name in names if (entry := _entry(written, name)) is not None}
    own = {name: entry["dtype"] for name in names if (entry := _entry(base, name)) is not None}

    def misfits(dtype: str | None) -> int:
        return sum(kind != (dtype or own.get(name)) for name, kind in found.items())

    return min([None, *sorted(set(found.values()))], key=misfits)


def _why_unlike(
    entry: Mapping[str, Any], base: Mapping[str, Any] | None, dtype: str | None, *, of_model: bool
) -> str | None:
    """Return why the values of a tensor cannot be compared with the base's values, or None if they can be compared.

    Args:
        dtype: the result of `_merge_dtype`.
        of_model: False for a tensor that the model does not use, such as a copy of a tied head. Such a tensor may also
            have the dtype that it has in the base.
    """
    if base is None:
        return "is not in the base"
    if entry["shape"] != base["shape"]:
        return f"has shape {shown(entry['shape'])}, but {shown(base['shape'])} in the base"
    allowed = {base["dtype"]} if dtype is None or base["dtype"] not in FLOAT_TYPES else {dtype}
    if entry["dtype"] not in (allowed if of_model else allowed | {base["dtype"]}):
        return f"is {entry['dtype']}, not {' '.join(allowed)}"
    return None


def _compare_values(
    base: MergedWeights, written: Any, name: str, entry: Mapping[str, Any], like: str, compared: Callable[[int], object]
) -> str | None:
    """Return how the values of a tensor differ from the expected values; None if they do not differ.

    Args:
        written: the opened file that holds the tensor.
        like: a description of the expected values.
        compared: called with the number of bytes after each block is compared.
    """
    count, first_row, furthest = 0, 0, 0
    stored = written.get_slice(name)
    for rows in row_blocks(tuple(entry["shape"]) or (1,)):
        part: Any = rows if entry["shape"] else ...  # a scalar has no rows
        found = stored[part]
        wanted = base.read(name, part).to(found.dtype)
        compared(found.nbytes)
        bits = (tensor.contiguous().view(_INTEGERS[tensor.itemsize]) for tensor in (found, wanted))
        found, wanted = torch.atleast_1d(*bits)
        if torch.equal(found, wanted):
            continue
        different = (found != wanted).flatten(1) if found.dim() > 1 else (found != wanted)[:, None]
        if not count:
            first_row = rows.start + int(different.any(1).nonzero()[0])
        count += int(different.sum())
        # Read as integers, positive floats have the same order. Negative floats also have a sign bit.
        lowest = torch.iinfo(found.dtype).min
        first, second = (torch.where(one < 0, lowest - one, one).double() for one in (found, wanted))
        furthest = max(furthest, int((first - second).abs().max()))
    if not count:
        return None
    where = f"in {count_text(count, 'value')}, first in row {first_row}"
    return f"differs from {like} {where}, by up to {count_text(furthest, 'unit')} in the last place"
