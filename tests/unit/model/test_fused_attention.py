"""Attention by tiles on a CPU and by fused kernels on a GPU: which kernel is chosen, what it is called with, and that
every result is attention's definition.

Without a GPU a stand-in takes each kernel's place: it has the library's arguments, checks them, and computes in fp64.
`-m gpu` runs the kernels themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from support.adapted_stages import attention_layer
from torch.nn import functional

from megatron_tiedlora.model import fused_attention
from megatron_tiedlora.model.batch import Documents, find_documents, whole_rows
from megatron_tiedlora.model.cpu_attention import TiledRows, attend_by_tiles, find_query_tiles
from megatron_tiedlora.model.fused_attention import CANDIDATES, Attend, attend_within, choose_attention, one_by_one
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.selfcheck.reference import plain_attention

HOST, GPU = torch.device("cpu"), torch.device("cuda:0")
FA3, FA4, FA2, FLASH, EFFICIENT = (candidate.name for candidate in CANDIDATES)
LOOP = "PyTorch's attention, one document after another"
choose = choose_attention.__wrapped__  # what a test has patched must not be remembered
# Documents of 5, 3, 8, 1 and 15 tokens in two rows of 16.
IDS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 8, [0] * 1 + [1] * 15])


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention within documents by its definition, in fp64, (b, s, heads * head_dim); `ids` (b, s) on the host."""
    query, key, value = (heads.double() for heads in (query, key, value))
    scaled = query if scale is None else query * (scale * query.shape[-1] ** 0.5)
    return plain_attention(scaled, key, value, ids)


def test_the_definition_is_that_of_torch() -> None:
    """check-gpu and the tests below judge by it: torch's attention with the mask written out, in fp64."""
    query, key, value = (part.detach().double() for part in heads(torch.float64))
    sees = (IDS[:, :, None] == IDS[:, None, :]) & torch.ones(16, 16, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=sees[:, None], enable_gqa=True)
    torch.testing.assert_close(attended(query, key, value, IDS), expected.transpose(1, 2).flatten(2))


def heads(
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    shape: tuple[int, int] = (2, 16),
    counts: tuple[int, int] = (6, 2),
    head_dim: int = 32,
) -> list[torch.Tensor]:
    """Queries of `counts[0]` heads, keys and values of `counts[1]`, as views of one storage by tokens; each a leaf."""
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(*shape, counts[0] + 2 * counts[1], head_dim, generator=generator).to(device, dtype)
    parts = fused.transpose(1, 2).split((counts[0], counts[1], counts[1]), dim=1)
    return [part.detach().requires_grad_() for part in parts]


def by_definition(query: Any, key: Any, value: Any, offsets: torch.Tensor, scale: float) -> torch.Tensor:
    """The oracle for (tokens, heads, head_dim) and offsets."""
    assert offsets.dtype == torch.int32
    ids = torch.bucketize(torch.arange(len(query)), offsets[1:], right=True)[None]
    rows = (part.transpose(0, 1)[None] for part in (query, key, value))
    return attended(*rows, ids, scale)[0].view(query.shape).to(query.dtype)


Calls = list[dict[str, Any]]


def stand_in(
    arguments: Sequence[str], compute: Callable[[dict[str, Any]], Any], calls: Calls, num_positional: int | None = None
) -> Callable[..., Any]:
    """A function with these arguments, so many of them by position, too; `calls` gets what it is called with."""

    def function(*positional: Any, **keywords: Any) -> Any:
        assert len(positional) <= len(arguments[:num_positional])
        given = dict(zip(arguments, positional, strict=False)) | keywords
        assert given.keys() <= set(arguments), f"no such arguments: {given.keys() - set(arguments)}"
        calls.append(given)
        return compute(given)

    return function


def flash_attn_varlen_func(given: dict[str, Any]) -> torch.Tensor:
    assert given["causal"] is True and given["cu_seqlens_q"] is given["cu_seqlens_k"]
    assert given["max_seqlen_q"] == given["max_seqlen_k"]
    return by_definition(given["q"], given["k"], given["v"], given["cu_seqlens_q"], given["softmax_scale"])


COMMON = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
# flash_attn 2.4.1 to 2.8, hopper/flash_attn_interface.py, and flash_attn 2.3, which has no `deterministic`.
ARGUMENTS_2_3 = (*COMMON, "dropout_p", "softmax_scale", "causal", "window_size", "return_attn_probs")
ARGUMENTS_2 = (*ARGUMENTS_2_3[:-1], "softcap", "alibi_slopes", "deterministic", "return_attn_probs", "block_table")
ARGUMENTS_3 = (
    *(*COMMON, "seqused_q", "seqused_k", "softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale"),
    *("window_size", "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin"),
    "return_attn_probs",
)
# flash-attn-4 4.0.0b36, flash_attn/cute/interface.py
ARGUMENTS_4 = (
    *("q", "k", "v", "qv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "min_seqlen_k", "seqused_q"),
    *("seqused_k", "gather_kv_indices", "page_table", "softmax_scale", "causal", "window_size", "learnable_sink"),
    *("softcap", "num_splits", "pack_gqa", "deterministic", "score_mod", "return_lse"),
)
LIBRARIES = {"flash_attn_interface": ARGUMENTS_3, "flash_attn.cute": ARGUMENTS_4, "flash_attn": ARGUMENTS_2}


def install(
    monkeypatch: pytest.MonkeyPatch, *names: str, arguments: tuple[str, ...] | None = None, as_tuple: bool = False
) -> dict[str, Calls]:
    """Have these libraries installed, and no other; the calls that each gets."""
    calls: dict[str, Calls] = {}
    for name, own in LIBRARIES.items():
        calls[name], module = [], ModuleType(name)
        compute = (lambda given: (flash_attn_varlen_func(given), None)) if as_tuple else flash_attn_varlen_func
        module.flash_attn_varlen_func = stand_in(arguments or own, compute, calls[name])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module if name in names else None)

    def find(name: str) -> ModuleSpec | None:
        if name == "flash_attn.cute" and name not in names:
            raise ImportError("undefined symbol") if "flash_attn" in names else ModuleNotFoundError("flash_attn")
        if name == "flash_attn" and "flash_attn.cute" in names and name not in names:
            return ModuleSpec(name, None)  # a folder without code
        return ModuleSpec(name, None, origin=f"{name}.py") if name in names else None

    monkeypatch.setattr(fused_attention, "find_spec", find)
    return calls


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tried = fused_attention._try
    monkeypatch.setattr(fused_attention, "_try", lambda attend, device, *rest: tried(attend, HOST, *rest))
    stand_in_for_operators(monkeypatch)


def stand_in_for_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators, with the arguments that this torch says they have."""
    for name, compute in OPERATORS.items():
        arguments = getattr(torch.ops.aten, name).default._schema.arguments
        num_positional = sum(not argument.kwarg_only for argument in arguments)
        function = stand_in([one.name for one in arguments], compute, [], num_positional)
        monkeypatch.setattr(torch.ops.aten, name, function)


def flash(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    assert query.dim() == 3 and query.shape[-1] % 8 == 0 and query.stride(-1) == 1
    assert given["cum_seq_q"] is given["cum_seq_k"] and given["max_q"] == given["max_k"]
    assert given["dropout_p"] == 0.0 and given["is_causal"] is True and given["return_debug_mask"] is False
    return by_definition(query, key, value, given["cum_seq_q"], given["scale"]), torch.empty(0)


def efficient(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    assert query.shape == key.shape == value.shape and len(query) == 1, "heads for every query, and one row"
    assert given["bias"] is None and given["dropout_p"] == 0.0 and given["custom_mask_type"] == 1
    assert given["cu_seqlens_q"] is given["cu_seqlens_k"] and given["max_seqlen_q"] == given["max_seqlen_k"]
    assert given["compute_log_sumexp"] is True, "its backward pass reads the log sums"
    mixed = by_definition(query[0], key[0], value[0], given["cu_seqlens_q"], given["scale"])
    return mixed[None], torch.empty(0)


OPERATORS = {"_flash_attention_forward": flash, "_efficient_attention_forward": efficient}


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "head_dim", "name"),
    [
        (("flash_attn_interface", "flash_attn"), (9, 0), torch.bfloat16, 128, FA3),
        (("flash_attn_interface", "flash_attn"), (8, 0), torch.bfloat16, 128, FA2),
        (("flash_attn_interface", "flash_attn"), (10, 0), torch.bfloat16, 128, FA2),
        (("flash_attn_interface",), (12, 0), torch.float16, 256, FLASH),
        (("flash_attn_interface", "flash_attn.cute"), (9, 0), torch.bfloat16, 128, FA3),
        (("flash_attn.cute", "flash_attn"), (9, 0), torch.bfloat16, 128, FA4),
        (("flash_attn.cute", "flash_attn"), (10, 3), torch.float16, 64, FA4),
        (("flash_attn.cute", "flash_attn"), (10, 0), torch.bfloat16, 256, FA2),
        (("flash_attn.cute",), (8, 0), torch.bfloat16, 128, FLASH),
        (("flash_attn",), (9, 0), torch.float16, 100, FA2),
        ((), (9, 0), torch.bfloat16, 128, FLASH),
        ((), (8, 6), torch.bfloat16, 12, FLASH),
        (("flash_attn_interface", "flash_attn"), (9, 0), torch.float32, 128, EFFICIENT),
        (("flash_attn_interface", "flash_attn"), (9, 0), torch.bfloat16, 264, EFFICIENT),
        (("flash_attn",), (7, 5), torch.float32, 128, EFFICIENT),
        (("flash_attn",), (7, 5), torch.float16, 128, EFFICIENT),
        (("flash_attn",), (7, 5), torch.bfloat16, 128, LOOP),
        (("flash_attn",), (9, 0), torch.float64, 128, LOOP),
    ],
)
def test_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[str, ...],
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    name: str,
) -> None:
    on_a_gpu(monkeypatch, capability)
    install(monkeypatch, *installed)
    route = choose(GPU, dtype, head_dim)
    assert route.name == name and str(route) == f"{name} ({route.reason})"
    before = [candidate.name for candidate in CANDIDATES]
    for other in before[: before.index(name) if name in before else len(before)]:
        assert other in route.reason, "what comes before it is passed over for a reason"


def test_elsewhere() -> None:
    assert choose(HOST, torch.bfloat16, 128).attend is None, "a CPU has cpu_attention.py"
    route = choose(torch.device("meta"), torch.bfloat16, 128)
    assert route.attend is one_by_one and "meta" in route.reason


def test_a_library_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for another torch, for another GPU, or without a backward pass: the run goes on, and says why."""
    on_a_gpu(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn_interface", "flash_attn")
    monkeypatch.delattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func")

    def without_a_kernel(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", without_a_kernel)
    route = choose(GPU, torch.bfloat16, 128)
    assert route.name == FLASH
    assert f"{FA3} does not run here: AttributeError" in route.reason
    assert f"{FA2} does not run here: RuntimeError: CUDA error: no kernel image is available" in route.reason
    assert "\n" not in str(route)


def test_a_backward_pass_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn")
    whole = sys.modules["flash_attn"].flash_attn_varlen_func
    monkeypatch.setattr(
        sys.modules["flash_attn"], "flash_attn_varlen_func", lambda *args, **keywords: whole(*args, **keywords).detach()
    )
    with torch.no_grad():  # as in a validation, which may come first
        assert choose(GPU, torch.bfloat16, 128).name == FLASH


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("module", "name"), zip(LIBRARIES, (FA3, FA4, FA2), strict=True))
def test_libraries_are_told_to_be_deterministic(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, deterministic: bool
) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    calls = install(monkeypatch, module)[module]
    assert choose(GPU, torch.bfloat16, 128, deterministic=deterministic).name == name
    assert [call.get("deterministic", False) for call in calls] == [deterministic]


def test_a_library_that_cannot_be_deterministic_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn", arguments=ARGUMENTS_2_3)
    assert choose(GPU, torch.bfloat16, 128).name == FA2
    route = choose(GPU, torch.bfloat16, 128, deterministic=True)
    assert route.name == FLASH and "deterministic" in route.reason


def assert_same(found: torch.Tensor, wanted: torch.Tensor, parts: Sequence[torch.Tensor], tolerance: float) -> None:
    """Values within 1e-12, gradients within the tolerance."""
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradient = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(*(torch.autograd.grad(x, parts, gradient) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", [32, 12])
@pytest.mark.parametrize("counts", [(6, 2), (4, 4)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("route", [FA3, FA3 + ", an early one", FA4, FA2, FLASH, EFFICIENT, LOOP])
def test_every_route_is_attention(
    monkeypatch: pytest.MonkeyPatch, route: str, packed: bool, counts: tuple[int, int], head_dim: int
) -> None:
    """Values and gradients are those of the definition, in fp64; heads of 12 are padded to 16."""
    install(monkeypatch, *LIBRARIES, as_tuple="early" in route)
    stand_in_for_operators(monkeypatch)
    makers = {candidate.name: candidate.make for candidate in CANDIDATES}
    attend = one_by_one if route == LOOP else makers[route.removesuffix(", an early one")](False)
    parts = heads(torch.float64, counts=counts, head_dim=head_dim)
    ids = IDS if packed else torch.zeros_like(IDS)
    documents = find_documents([IDS], HOST) if packed else whole_rows(*IDS.shape, HOST)
    assert_same(attend_within(*parts, documents, attend), attended(*parts, ids), parts, 1e-12)


def test_documents_of_one_length_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        lengths.append(query.shape[2])
        return original(query, *args, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    attend_within(*heads(torch.float64), whole_rows(2, 16, HOST), one_by_one)
    assert lengths == [16]
    attend_within(*heads(torch.float64), find_documents([IDS], HOST), one_by_one)
    assert lengths == [16, 5, 3, 8, 1, 15]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("counts", [(6, 2), (4, 4)])
def test_a_layer_gives_what_it_gives_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, packed: bool, counts: tuple[int, int]
) -> None:
    """The path of a GPU, through PyTorch's flash kernel, against blocks."""
    stand_in_for_operators(monkeypatch)
    layer = attention_layer(*counts, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    ids = IDS if packed else None
    context = layer.context(torch.arange(16).expand(2, 16), torch.float64, documents=ids)
    documents: Documents = find_documents([IDS], HOST) if packed else whole_rows(2, 16, HOST)
    attend = partial(attend_within, documents=documents, attend=fused_attention._torch_flash)
    on_gpu = replace(context, attend=attend)
    hidden = torch.randn(2, 16, 48, dtype=torch.float64)
    wanted, found = (layer.attend(hidden, given, TensorParallel()) for given in (context, on_gpu))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# Where documents begin and end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "bounds", "longest"),
    [
        ([IDS], [0, 5, 8, 16, 17, 32], 15),
        ([torch.zeros(3, 7, dtype=torch.int64)], [0, 7, 14, 21], 7),
        ([torch.tensor([[0, 0, 1], [1, 1, 1]]), torch.tensor([[1, 2]])], [0, 2, 3, 6, 7, 8], 3),
    ],
    ids=["rows", "one a row", "blocks end to end"],
)
def test_a_new_id_a_new_row_and_a_new_block_begin_a_document(
    blocks: list[torch.Tensor], bounds: list[int], longest: int
) -> None:
    """A document never goes on in the next row or block, although the id is the same."""
    found = [find_documents(blocks, HOST)]
    if not blocks[0].any():
        found.append(whole_rows(*blocks[0].shape, HOST))
    for documents in found:
        assert documents.bounds == documents.offsets.tolist() == bounds and documents.longest == longest
        assert documents.offsets.dtype == torch.int32


# By tiles on a CPU ----------------------------------------------------------------------------------------------------

# shared keys or not, lengths that blocks of 64 divide or not
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"counts": (6, 2), "head_dim": 16, "shape": (2, 200)},
    "mha": {"counts": (4, 4), "head_dim": 8, "shape": (1, 40)},
    "mqa": {"counts": (3, 1), "head_dim": 8, "shape": (3, 128)},
}


@pytest.mark.parametrize("size", [64, 24])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(shape: str, packed: bool, size: int) -> None:
    parts, (rows, length) = heads(torch.float64, **SHAPES[shape]), SHAPES[shape]["shape"]
    ids = None
    if packed:  # of each row other documents, some of one token, some longer than a block
        ids = torch.randint(0, 6, (rows, length), generator=torch.Generator().manual_seed(2)).sort(dim=1).values
    wanted = attended(*parts, torch.zeros(rows, length) if ids is None else ids)
    found = attend_by_tiles(*parts, [TiledRows(rows, length, find_query_tiles(ids, length, size=size))], EAGER)
    assert_same(found, wanted, parts, 1e-11)


def test_blocks_leave_out_what_no_row_sees() -> None:
    """Every query once; keys from the first that a row sees in it, so documents cost what they are long."""
    ids = torch.tensor([[0] * 30 + [1] * 40 + [2] * 30, [0] * 50 + [1] * 50])
    blocks = find_query_tiles(ids, 100, size=32)
    assert [block[:3] for block in blocks] == [(96, 100, 50), (64, 96, 30), (32, 64, 0), (0, 32, 0)]
    assert all(mask.shape == (2, 1, stop - start, stop - first) for start, stop, first, mask in blocks)
    assert all((block.mask == 0).any(-1).all() for block in blocks)  # every query sees itself
    whole = find_query_tiles(None, 100, size=32)
    assert [block.first for block in whole] == [0] * 4
    assert whole[0].mask.shape == (1, 1, 4, 100) and whole[0].mask.element_size() == 2


def test_bf16_rounds_no_worse_than_pytorchs_kernel() -> None:
    """Errors against fp64 by norm: the result within 1.5 times, all gradients together within 1.1 times of SDPA's.

    Scores and sums over blocks are fp32 here, while the exponentials are rounded before they are divided, and dO V^T is
    rounded once.
    """
    parts = heads(torch.bfloat16, **SHAPES["gqa"])
    wide = [part.detach().double().requires_grad_() for part in parts]
    wanted = attended(*wide, torch.zeros(2, 200))
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    truth = (wanted.detach(), *torch.autograd.grad(wanted, wide, gradient.double()))
    blocks = find_query_tiles(None, 200, size=64)
    mine = attend_by_tiles(*parts, [TiledRows(len(parts[0]), 200, blocks)], EAGER)
    theirs = functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    errors = []
    for found in (mine, theirs):
        values = (found.detach(), *torch.autograd.grad(found, parts, gradient))
        pairs = zip(values, truth, strict=True)
        errors.append([float((value.double() - true).norm() / true.norm()) for value, true in pairs])
    assert errors[0][0] <= 1.5 * errors[1][0]
    assert sum(errors[0][1:]) <= 1.1 * sum(errors[1][1:])


# On a GPU -------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOUND = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 5e-5}  # largest error over largest value
# Documents of 1 to 200 tokens in two rows of 300.
LENGTHS = torch.tensor([1, 64, 200, 35, 130, 7, 128, 35])
LONG_IDS = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS).view(2, 300)


def routes(dtype: torch.dtype, head_dim: int, *, deterministic: bool = False) -> Iterator[tuple[str, Attend]]:
    """What runs here; a candidate that should and does not is an error, one that is not installed is not."""
    for candidate in CANDIDATES:
        obstacle = candidate.obstacle(torch.cuda.get_device_capability(), dtype, head_dim)
        print(f"{candidate.name} {obstacle or 'is tried'}")
        if obstacle is None:
            attend = candidate.make(deterministic)
            fused_attention._try(attend, GPU, dtype, head_dim)
            yield candidate.name, attend
    yield LOOP, one_by_one


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 80, 100, 128])
@pytest.mark.parametrize("counts", [(8, 8), (8, 2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_every_route_on_a_gpu(dtype: torch.dtype, packed: bool, counts: tuple[int, int], head_dim: int) -> None:
    """Forwards and backwards against the definition in fp64."""
    parts = heads(dtype, device="cuda", shape=(2, 300), counts=counts, head_dim=head_dim)
    documents = find_documents([LONG_IDS], GPU) if packed else whole_rows(2, 300, GPU)
    wanted = attended(*parts, LONG_IDS if packed else torch.zeros_like(LONG_IDS))
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).cuda().to(dtype)
    expected = (wanted, *torch.autograd.grad(wanted, parts, gradient.double()))
    for name, attend in routes(dtype, head_dim):
        mixed = attend_within(*parts, documents, attend)
        found = (mixed, *torch.autograd.grad(mixed, parts, gradient))
        errors = [
            float((ours.double() - theirs).abs().max() / theirs.abs().max())
            for ours, theirs in zip(found, expected, strict=True)
        ]
        print(f"{name}: out, dq, dk, dv off by {', '.join(f'{size:.1e}' for size in errors)}")
        assert max(errors) < BOUND[dtype], name


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_deterministic_gradients_are_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parts = heads(dtype, device="cuda", shape=(4, 2048), counts=(8, 2), head_dim=128)
    documents = whole_rows(4, 2048, GPU)
    torch.use_deterministic_algorithms(True)
    try:
        for name, attend in routes(dtype, 128, deterministic=True):
            found = [attend_within(*parts, documents, attend) for _ in range(4)]
            gradients = [torch.autograd.grad(mixed.square().sum(), parts) for mixed in found]
            for again in range(1, 4):
                assert torch.equal(found[0], found[again]), name
                for once, later in zip(gradients[0], gradients[again], strict=True):
                    assert torch.equal(once, later), name
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@needs_gpu
def test_the_choice_waits_for_nothing_later() -> None:
    """Attention, once chosen, has no wait of the host for the device, forwards or backwards."""
    route = choose(GPU, torch.bfloat16, 128)
    assert route.attend is not None
    parts = heads(torch.bfloat16, device="cuda", shape=(2, 300), counts=(8, 2), head_dim=128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for documents in (find_documents([LONG_IDS], GPU), whole_rows(2, 300, GPU)):
            attend_within(*parts, documents, route.attend).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
