"""Attention by fused kernels on a GPU: which kernel is chosen, what it is called with, and that every result is
attention's definition.

Without a GPU a stand-in takes each kernel's place: it has the library's arguments, checks them, and computes in fp64.
`-m gpu` runs the kernels themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.adapted_stages import attention_layer
from support.attention_oracle import assert_same, attended, heads
from support.fused_stand_ins import (
    ARGUMENTS_2_3,
    HOST,
    LIBRARIES,
    OPERATOR_CALLS,
    flash_attn_varlen_func,
    install,
    on_a_gpu,
    stand_in_for_operators,
)
from torch.nn import functional

from megatron_tiedlora.model import fused_attention
from megatron_tiedlora.model.batch import Documents, find_documents, whole_rows
from megatron_tiedlora.model.cpu_attention import Scores
from megatron_tiedlora.model.fused_attention import CANDIDATES, Attend, attend_within, choose_attention, one_by_one
from megatron_tiedlora.model.regions import run_steps
from megatron_tiedlora.parallel.frozen_weight import HALF
from megatron_tiedlora.parallel.groups import TensorParallel

GPU = torch.device("cuda:0")
FA3, FA4, CUDNN, FA2, FLASH, EFFICIENT = (candidate.name for candidate in CANDIDATES)
LOOP, TILES = "PyTorch's attention, one document after another", "tiles of queries"
choose = choose_attention.__wrapped__  # what a test has patched must not be remembered
# Documents of 5, 3, 8, 1 and 15 tokens in two rows of 16.
IDS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 8, [0] * 1 + [1] * 15])


def test_the_definition_is_that_of_torch() -> None:
    """check-gpu and the tests below judge by it: torch's attention with the mask written out, in fp64."""
    query, key, value = (part.detach().double() for part in heads(torch.float64))
    sees = (IDS[:, :, None] == IDS[:, None, :]) & torch.ones(16, 16, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=sees[:, None], enable_gqa=True)
    torch.testing.assert_close(attended(query, key, value, IDS), expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "head_dim", "names"),
    [
        (("flash_attn_interface", "flash_attn"), (9, 0), torch.bfloat16, 128, (FA3,)),
        (("flash_attn_interface", "flash_attn"), (8, 0), torch.bfloat16, 128, (FA2,)),
        (("flash_attn_interface", "flash_attn"), (10, 0), torch.bfloat16, 128, (CUDNN, FA2)),
        (("flash_attn_interface",), (12, 0), torch.float16, 256, (FLASH,)),
        (("flash_attn_interface", "flash_attn.cute"), (9, 0), torch.bfloat16, 128, (FA3,)),
        (("flash_attn.cute", "flash_attn"), (9, 0), torch.bfloat16, 128, (FA4,)),
        (("flash_attn.cute", "flash_attn"), (10, 3), torch.float16, 64, (FA4,)),
        (("flash_attn.cute", "flash_attn"), (10, 0), torch.bfloat16, 256, (FA2,)),
        (("flash_attn.cute",), (8, 0), torch.bfloat16, 128, (FLASH,)),
        (("flash_attn",), (9, 0), torch.float16, 100, (CUDNN, FA2)),
        ((), (9, 0), torch.bfloat16, 128, (CUDNN, FLASH)),
        ((), (8, 6), torch.bfloat16, 12, (FLASH,)),
        (("flash_attn_interface", "flash_attn"), (9, 0), torch.float32, 128, (EFFICIENT,)),
        (("flash_attn_interface", "flash_attn"), (9, 0), torch.bfloat16, 264, (EFFICIENT,)),
        (("flash_attn",), (7, 5), torch.float32, 128, (EFFICIENT,)),
        (("flash_attn",), (7, 5), torch.float16, 128, (EFFICIENT,)),
        (("flash_attn",), (7, 5), torch.bfloat16, 128, (LOOP,)),
        (("flash_attn",), (9, 0), torch.float64, 128, (LOOP,)),
    ],
)
def test_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[str, ...],
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    names: tuple[str, ...],
) -> None:
    """The second of two names is the kernel of rows that the first does not support."""
    on_a_gpu(monkeypatch, capability)
    install(monkeypatch, *installed)
    route = choose(GPU, dtype, head_dim)
    assert (route.name, *filter(None, [route.otherwise])) == names
    assert str(route) == f"{', '.join(names)}{' for other rows' if route.otherwise else ''} ({route.reason})"
    before = [candidate.name for candidate in CANDIDATES]
    for other in before[: before.index(names[-1]) if names[-1] in before else len(before)]:
        assert other in route.reason or other == route.name, "what comes before it is passed over for a reason"


def test_elsewhere() -> None:
    assert choose(HOST, torch.bfloat16, 128).attend is None, "a CPU has cpu_attention.py"
    route = choose(torch.device("meta"), torch.bfloat16, 128)
    assert route.attend is one_by_one and "meta" in route.reason
    for needs in ({"window": True}, {"cap": 5.0}):
        route = choose(torch.device("meta"), torch.bfloat16, 128, **needs)
        assert route.attend is None and str(route).startswith("tiles of queries (") and "meta" in route.reason


ALL = ("flash_attn_interface", "flash_attn.cute", "flash_attn")


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "needs", "name"),
    [
        (ALL, (9, 0), torch.bfloat16, {"window": True}, FA3),
        (ALL[1:], (9, 0), torch.bfloat16, {"window": True}, FA4),
        (ALL[2:], (9, 0), torch.bfloat16, {"window": True}, FA2),
        ((), (9, 0), torch.bfloat16, {"window": True}, FLASH),
        (ALL, (9, 0), torch.float32, {"window": True}, TILES),
        (ALL, (9, 0), torch.bfloat16, {"cap": 50.0}, FA3),
        (ALL[1:], (9, 0), torch.bfloat16, {"cap": 50.0, "window": True}, FA2),
        (ALL[1:2], (9, 0), torch.bfloat16, {"cap": 50.0}, TILES),
        ((), (9, 0), torch.float16, {"cap": 50.0, "window": True}, TILES),
        (ALL, (7, 5), torch.float16, {"cap": 50.0}, TILES),
    ],
)
def test_what_is_chosen_for_windows_and_caps(
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[str, ...],
    capability: tuple[int, int],
    dtype: torch.dtype,
    needs: dict[str, Any],
    name: str,
) -> None:
    """cuDNN and the memory-efficient kernel have none of both, FlashAttention 4 and PyTorch's flash kernel no caps."""
    on_a_gpu(monkeypatch, capability)
    calls = install(monkeypatch, *installed)
    route = choose(GPU, dtype, 128, **needs)
    assert (route.name, route.otherwise) == (name, "") and (route.attend is None) == (name == TILES)
    reasons = dict.fromkeys((CUDNN, EFFICIENT), "has no windows" if "window" in needs else "does not cap scores")
    reasons |= {} if "cap" not in needs else dict.fromkeys((FA4, FLASH), "does not cap scores")
    for other in (candidate for candidate in CANDIDATES if candidate.name in route.reason and dtype in HALF):
        if capability >= (9, 0) and (not isinstance(other.kernel, str) or other.kernel in installed):
            assert f"{other.name} {reasons[other.name]}" in route.reason
    tried = [call for of_library in calls.values() for call in of_library] + OPERATOR_CALLS["_flash_attention_forward"]
    windows = [call.get("window_size", (call.get("window_size_left"), 0)) for call in tried]
    assert name == TILES or windows == [(1 if "window" in needs else None, 0)], "it is tried with a window"
    assert name == TILES or [call.get("softcap") for call in tried] == [needs.get("cap")]


def test_a_backward_pass_that_does_not_cap_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attn 2.6.0 and 2.6.1 cap in the forward pass alone; their probabilities then sum to more than 1."""

    class OnlyForward(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, query: Any, key: Any, value: Any, given: dict[str, Any]) -> torch.Tensor:
            context.save_for_backward(query, key, value)
            context.given = given
            return flash_attn_varlen_func(given).detach()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
            query, key, _ = context.saved_tensors
            scores = torch.einsum("qhd,kgd->hqk", query.double(), key.double())
            weights = (scores - 50 * (scores / 50).tanh()).exp() / len(key)  # as exp(scores - log sums)
            return query * 0, key * 0, torch.einsum("hqk,qhd->kd", weights, gradient.double())[:, None].bfloat16(), None

    on_a_gpu(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn")

    def early(*args: Any, **given: Any) -> torch.Tensor:
        given |= dict(zip("qkv", args, strict=True))
        result: torch.Tensor = OnlyForward.apply(*args, given)
        return result

    assert choose(GPU, torch.bfloat16, 128, cap=50.0).name == FA2
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", early)
    route = choose(GPU, torch.bfloat16, 128, cap=50.0)
    assert route.name == TILES and f"{FA2} does not run here: RuntimeError: its backward pass" in route.reason
    install(monkeypatch, "flash_attn", arguments=ARGUMENTS_2_3)
    route = choose(GPU, torch.bfloat16, 128, cap=50.0)
    assert route.name == TILES and "softcap" in route.reason


def test_a_library_that_does_not_run_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for another torch, for another GPU, or without a backward pass: the run goes on, and says why."""
    on_a_gpu(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn_interface", "flash_attn")
    monkeypatch.delattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func")

    def without_a_kernel(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", without_a_kernel)
    route = choose(GPU, torch.bfloat16, 128)
    assert (route.name, route.otherwise) == (CUDNN, FLASH)
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
        route = choose(GPU, torch.bfloat16, 128)
    assert route.otherwise == FLASH and f"{FA2} does not run here: RuntimeError" in route.reason


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("module", "name"), zip(LIBRARIES, (FA3, FA4, FA2), strict=True))
def test_libraries_are_told_to_be_deterministic(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, deterministic: bool
) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    calls = install(monkeypatch, module)[module]
    route = choose(GPU, torch.bfloat16, 128, deterministic=deterministic)
    assert (route.otherwise or route.name) == name
    assert [call.get("deterministic", False) for call in calls] == [deterministic]


def test_a_library_that_cannot_be_deterministic_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    install(monkeypatch, "flash_attn", arguments=ARGUMENTS_2_3)
    assert choose(GPU, torch.bfloat16, 128).otherwise == FA2
    route = choose(GPU, torch.bfloat16, 128, deterministic=True)
    assert route.name == FLASH and "deterministic" in route.reason


@pytest.mark.parametrize(
    ("version", "deterministic", "words"),
    [
        (91500, False, "needs cuDNN 9.15.1"),
        (None, False, "needs cuDNN 9.15.1"),
        (91501, True, "has gradients that differ from run to run"),
    ],
)
def test_a_cudnn_that_is_old_or_would_not_be_deterministic_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, version: int | None, deterministic: bool, words: str
) -> None:
    on_a_gpu(monkeypatch, (9, 0))
    install(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    route = choose(GPU, torch.bfloat16, 128, deterministic=deterministic)
    assert (route.name, route.otherwise) == (FLASH, "") and f"{CUDNN} {words}" in route.reason


@pytest.mark.parametrize("head_dim", [32, 12])
@pytest.mark.parametrize("counts", [(6, 2), (4, 4)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("route", "how"),
    [
        *((route, Scores(0.3)) for route in (FA3, FA3 + ", an early one", FA4, FA2, FLASH, EFFICIENT, LOOP)),
        *((route, Scores(0.3, window)) for route in (FA3, FA4, FA2, FLASH) for window in (1, 4, 15)),
        *((route, Scores(0.9, window, 2.0)) for route in (FA3, FA2) for window in (None, 4)),
    ],
    ids=str,
)
def test_every_route_is_attention(
    monkeypatch: pytest.MonkeyPatch, route: str, how: Scores, packed: bool, counts: tuple[int, int], head_dim: int
) -> None:
    """Values and gradients are those of the definition, in fp64; heads of 12 are padded to 16."""
    install(monkeypatch, *LIBRARIES, as_tuple="early" in route)
    stand_in_for_operators(monkeypatch)
    makers = {candidate.name: candidate.make for candidate in CANDIDATES}
    attend = one_by_one if route == LOOP else makers[route.removesuffix(", an early one")](False)
    parts = heads(torch.float64, counts=counts, head_dim=head_dim)
    ids = IDS if packed else torch.zeros_like(IDS)
    documents = find_documents([IDS], HOST) if packed else whole_rows(*IDS.shape, HOST)
    assert_same(attend_within(*parts, documents, how, attend), attended(*parts, ids, how), parts, 1e-12)


@pytest.mark.parametrize(
    ("lengths", "kernel"),
    [
        ([128, 128], "_scaled_dot_product_cudnn_attention"),
        ([256], "_scaled_dot_product_cudnn_attention"),
        ([128, 64, 64], "_flash_attention_forward"),  # packed
        ([120, 120], "_flash_attention_forward"),  # no multiple of 128
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [16, 12])
def test_cudnn_gets_documents_of_one_length(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], kernel: str, head_dim: int
) -> None:
    """Values and gradients are those of the definition. Rows are views, and a gradient has its result's strides."""
    on_a_gpu(monkeypatch, (9, 0))
    install(monkeypatch)
    attend = choose(GPU, torch.bfloat16, 128).attend
    assert attend is not None
    for calls in OPERATOR_CALLS.values():
        calls.clear()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    parts = heads(torch.float64, shape=(1, sum(lengths)), head_dim=head_dim)
    how = Scores(0.3)
    mixed, wanted = attend_within(*parts, find_documents([ids], HOST), how, attend), attended(*parts, ids, how)
    assert [name for name, calls in OPERATOR_CALLS.items() for _ in calls] == [kernel]
    (given,) = OPERATOR_CALLS[kernel]
    assert head_dim == 12 or given["query"].data_ptr() == parts[0].data_ptr(), "a view"
    torch.testing.assert_close(mixed, wanted, rtol=1e-12, atol=1e-12)
    gradient = torch.randn(mixed.mT.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).mT
    for ours, theirs in zip(*(torch.autograd.grad(x, parts, gradient) for x in (mixed, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_documents_of_one_length_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        lengths.append(query.shape[2])
        return original(query, *args, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    attend_within(*heads(torch.float64), whole_rows(2, 16, HOST), Scores(1.0), one_by_one)
    assert lengths == [16]
    attend_within(*heads(torch.float64), find_documents([IDS], HOST), Scores(1.0), one_by_one)
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
    given = {"documents": documents, "scores": Scores(8**-0.5)}
    attend = partial(attend_within, **given, attend=fused_attention._torch_flash)
    on_gpu = replace(context, attend={None: attend})
    hidden = torch.randn(2, 16, 48, dtype=torch.float64)
    steps = (layer.steps(hidden, None, given, TensorParallel()) for given in (context, on_gpu))
    (_, wanted), (_, found) = map(run_steps, steps)
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


# On a GPU -------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BOUND = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 5e-5}  # largest error over largest value
# Documents of 1 to 200 tokens in two rows of 300.
LENGTHS = torch.tensor([1, 64, 200, 35, 130, 7, 128, 35])
LONG_IDS = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS).view(2, 300)


def routes(
    dtype: torch.dtype, head_dim: int, documents: Documents, how: Scores, *, deterministic: bool = False
) -> Iterator[tuple[str, Attend]]:
    """What runs here; a candidate that should and does not is an error, one that is not installed is not."""
    for candidate in CANDIDATES:
        if candidate.name == CUDNN and (deterministic or len(documents.bounds) > 3):  # packed
            continue
        needs: dict[str, Any] = {"window": how.window is not None, "cap": how.cap}
        obstacle = candidate.obstacle(torch.cuda.get_device_capability(), dtype, head_dim, **needs)
        print(f"{candidate.name} {obstacle or 'is tried'}")
        if obstacle is None:
            attend = candidate.make(deterministic)
            fused_attention._try(attend, GPU, dtype, head_dim, candidate.multiple, how)
            yield candidate.name, attend
    if how[1:] == (None, None):
        yield LOOP, one_by_one


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 80, 100, 128])
@pytest.mark.parametrize("counts", [(8, 8), (8, 2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", [Scores(0.1), Scores(0.1, 50), Scores(0.3, 50, 2.0), Scores(0.3, None, 2.0)], ids=str)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_every_route_on_a_gpu(
    dtype: torch.dtype, packed: bool, counts: tuple[int, int], head_dim: int, how: Scores
) -> None:
    """Forwards and backwards against the definition in fp64."""
    length = LONG_IDS.shape[1] if packed else 384  # a multiple of 128
    parts = heads(dtype, device="cuda", shape=(2, length), counts=counts, head_dim=head_dim)
    documents = find_documents([LONG_IDS], GPU) if packed else whole_rows(2, length, GPU)
    wanted = attended(*parts, LONG_IDS if packed else torch.zeros(2, length), how)
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).cuda().to(dtype)
    expected = (wanted, *torch.autograd.grad(wanted, parts, gradient.double()))
    for name, attend in routes(dtype, head_dim, documents, how):
        mixed = attend_within(*parts, documents, how, attend)
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
        for name, attend in routes(dtype, 128, documents, Scores(0.1), deterministic=True):
            found = [attend_within(*parts, documents, Scores(0.1), attend) for _ in range(4)]
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
            attend_within(*parts, documents, Scores(0.1), route.attend).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
