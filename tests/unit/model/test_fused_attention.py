"""Which kernel computes attention on a GPU, what it is called with, and that its result is attention's definition.

Without a GPU a stand-in takes each kernel's place: it has the library's arguments, checks them, and computes in fp64.
`-m gpu` runs the kernels themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_layers import attention_layer
from attention_oracle import IDS, attended, heads

from megatron_tiedlora.model import fused_attention
from megatron_tiedlora.model.batch import Documents, find_documents, whole_rows
from megatron_tiedlora.model.fused_attention import CANDIDATES, Attend, attend_within, choose_attention, one_by_one
from megatron_tiedlora.parallel.groups import TensorParallel

HOST, GPU = torch.device("cpu"), torch.device("cuda:0")
FA3, FA2, FLASH, EFFICIENT = (candidate.name for candidate in CANDIDATES)
LOOP = "PyTorch's attention, one document after another"
choose = choose_attention.__wrapped__  # what a test has patched must not be remembered


def by_definition(query: Any, key: Any, value: Any, offsets: torch.Tensor, scale: float) -> torch.Tensor:
    """The oracle for (tokens, heads, head_dim) and offsets."""
    assert offsets.dtype == torch.int32
    ids = torch.bucketize(torch.arange(len(query)), offsets[1:], right=True)[None]
    rows = (part.transpose(0, 1)[None] for part in (query, key, value))
    return attended(*rows, ids, scale)[0].view(query.shape).to(query.dtype)


Calls = list[dict[str, Any]]


def library(name: str, arguments: tuple[str, ...], *, as_tuple: bool) -> tuple[ModuleType, Calls]:
    """A module whose flash_attn_varlen_func has these arguments, and the calls that it got."""
    calls: Calls = []

    def flash_attn_varlen_func(*positional: Any, **keywords: Any) -> Any:
        given = dict(zip(arguments, positional, strict=False)) | keywords
        assert given.keys() <= set(arguments), f"no such arguments: {given.keys() - set(arguments)}"
        calls.append(given)
        assert given["causal"] is True and given["cu_seqlens_q"] is given["cu_seqlens_k"]
        assert given["max_seqlen_q"] == given["max_seqlen_k"]
        mixed = by_definition(given["q"], given["k"], given["v"], given["cu_seqlens_q"], given["softmax_scale"])
        return (mixed, None) if as_tuple else mixed

    module = ModuleType(name)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module, calls


COMMON = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
# flash_attn 2.4.1 to 2.8, hopper/flash_attn_interface.py, and flash_attn 2.3, which has no `deterministic`.
ARGUMENTS_2_3 = (*COMMON, "dropout_p", "softmax_scale", "causal", "window_size", "return_attn_probs")
ARGUMENTS_2 = (*ARGUMENTS_2_3[:-1], "softcap", "alibi_slopes", "deterministic", "return_attn_probs", "block_table")
ARGUMENTS_3 = (
    *(*COMMON, "seqused_q", "seqused_k", "softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale"),
    *("window_size", "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin"),
    "return_attn_probs",
)


def install(
    monkeypatch: pytest.MonkeyPatch, *names: str, arguments: tuple[str, ...] | None = None, as_tuple: bool = False
) -> dict[str, Calls]:
    """Have these libraries installed, and no other; the calls that each gets."""
    calls = {}
    for name, own in (("flash_attn_interface", ARGUMENTS_3), ("flash_attn", ARGUMENTS_2)):
        module, calls[name] = library(name, arguments or own, as_tuple=as_tuple)
        monkeypatch.setitem(sys.modules, name, module if name in names else None)
    monkeypatch.setattr(fused_attention, "find_spec", lambda name: ModuleSpec(name, None) if name in names else None)
    return calls


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tried = fused_attention._try
    monkeypatch.setattr(fused_attention, "_try", lambda attend, device, *rest: tried(attend, HOST, *rest))
    stand_in_for_operators(monkeypatch)


def stand_in_for_operators(monkeypatch: pytest.MonkeyPatch) -> dict[str, Calls]:
    """PyTorch's operators, with the arguments that this torch says they have; the calls that each gets."""
    calls: dict[str, Calls] = {}

    def stand_in(name: str) -> None:
        schema = getattr(torch.ops.aten, name).default._schema
        arguments = [argument.name for argument in schema.arguments]
        positional_only = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        calls[name] = []

        def operator(*positional: Any, **keywords: Any) -> tuple[torch.Tensor, ...]:
            assert len(positional) <= len(positional_only) and keywords.keys() <= set(arguments)
            given = dict(zip(positional_only, positional, strict=False)) | keywords
            calls[name].append(given)
            return OPERATORS[name](given)

        monkeypatch.setattr(torch.ops.aten, name, operator)

    for name in OPERATORS:
        stand_in(name)
    return calls


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
@pytest.mark.parametrize(("module", "name"), [("flash_attn_interface", FA3), ("flash_attn", FA2)])
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


@pytest.mark.parametrize("head_dim", [32, 12])
@pytest.mark.parametrize("counts", [(6, 2), (4, 4)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("route", [FA3, FA3 + ", an early one", FA2, FLASH, EFFICIENT, LOOP])
def test_every_route_is_attention(
    monkeypatch: pytest.MonkeyPatch, route: str, packed: bool, counts: tuple[int, int], head_dim: int
) -> None:
    """Values and gradients are those of the definition, in fp64; heads of 12 are padded to 16."""
    install(monkeypatch, "flash_attn_interface", "flash_attn", as_tuple="early" in route)
    stand_in_for_operators(monkeypatch)
    makers = {candidate.name: candidate.make for candidate in CANDIDATES}
    attend = one_by_one if route == LOOP else makers[route.removesuffix(", an early one")](False)
    parts = heads(torch.float64, counts=counts, head_dim=head_dim)
    ids = IDS if packed else torch.zeros_like(IDS)
    documents = find_documents([IDS], HOST) if packed else whole_rows(*IDS.shape, HOST)
    found, wanted = attend_within(*parts, documents, attend), attended(*parts, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradient = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, gradient), torch.autograd.grad(wanted, parts, gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


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


def test_a_new_id_and_a_new_row_begin_a_document() -> None:
    found = find_documents([IDS], HOST)
    assert found.bounds == [0, 5, 8, 16, 17, 32] and found.longest == 15
    assert found.offsets.tolist() == found.bounds and found.offsets.dtype == torch.int32


def test_rows_of_one_document_each() -> None:
    rows = whole_rows(3, 7, HOST)
    assert rows.bounds == rows.offsets.tolist() == [0, 7, 14, 21] and rows.longest == 7
    assert rows.offsets.dtype == torch.int32
    found = find_documents([torch.zeros(3, 7, dtype=torch.int64)], HOST)
    assert found.bounds == rows.bounds and found.longest == rows.longest


def test_documents_of_blocks_end_to_end() -> None:
    """Rows of different lengths; a document never goes on in the next row or block, although the id is the same."""
    blocks = [torch.tensor([[0, 0, 1], [1, 1, 1]]), torch.tensor([[1, 2]])]
    found = find_documents(blocks, HOST)
    assert found.bounds == [0, 2, 3, 6, 7, 8] and found.offsets.tolist() == found.bounds and found.longest == 3


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
    wanted = attended(*parts, (LONG_IDS if packed else torch.zeros_like(LONG_IDS)).cuda())
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
