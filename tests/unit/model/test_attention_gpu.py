"""On a GPU: every kernel for attention that runs on it against the definition in fp64, forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_oracle import attended, heads

from megatron_tiedlora.model.batch import find_documents, whole_rows
from megatron_tiedlora.model.fused_attention import (
    CANDIDATES,
    Attend,
    _try,
    attend_within,
    choose_attention,
    one_by_one,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHAPE = (2, 300)
BOUND = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 5e-5}  # largest error over largest value


def ids(packed: bool) -> torch.Tensor:
    """Documents of 1 to 200 tokens, or one a row; on the host."""
    lengths = torch.tensor([1, 64, 200, 35, 130, 7, 128, 35])
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths).view(SHAPE)
    return numbers if packed else torch.zeros(SHAPE, dtype=torch.int64)


def routes(dtype: torch.dtype, head_dim: int, *, deterministic: bool = False) -> Iterator[tuple[str, Attend]]:
    """What runs here; a candidate that should and does not is an error, one that is not installed is not."""
    device = torch.device("cuda")
    for candidate in CANDIDATES:
        obstacle = candidate.obstacle(torch.cuda.get_device_capability(), dtype, head_dim)
        print(f"{candidate.name} {obstacle or 'is tried'}")
        if obstacle is None:
            attend = candidate.make(deterministic)
            _try(attend, device, dtype, head_dim)
            yield candidate.name, attend
    yield "one document after another", one_by_one


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("head_dim", [64, 80, 100, 128])
@pytest.mark.parametrize("counts", [(8, 8), (8, 2)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_every_route_against_fp64(dtype: torch.dtype, packed: bool, counts: tuple[int, int], head_dim: int) -> None:
    parts = heads(dtype, device="cuda", shape=SHAPE, counts=counts, head_dim=head_dim)
    documents = find_documents([ids(True)], parts[0].device) if packed else whole_rows(*SHAPE, parts[0].device)
    wanted = attended(*parts, ids(packed).cuda())
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).cuda().to(dtype)
    wanted_gradients = torch.autograd.grad(wanted, parts, gradient.double())
    for name, attend in routes(dtype, head_dim):
        found = attend_within(*parts, documents, attend)
        errors = [error(found, wanted)]
        for ours, theirs in zip(torch.autograd.grad(found, parts, gradient), wanted_gradients, strict=True):
            errors.append(error(ours, theirs))
        print(f"{name}: out, dq, dk, dv off by {', '.join(f'{size:.1e}' for size in errors)}")
        assert max(errors) < BOUND[dtype], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_deterministic_gradients_are_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parts = heads(dtype, device="cuda", shape=(4, 2048), counts=(8, 2), head_dim=128)
    documents = whole_rows(4, 2048, parts[0].device)
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


def test_the_choice_waits_for_nothing_later() -> None:
    """Attention, once chosen, has no wait of the host for the device, forwards or backwards."""
    route = choose_attention(torch.device("cuda"), torch.bfloat16, 128)
    assert route.attend is not None
    parts = heads(torch.bfloat16, device="cuda", shape=SHAPE, counts=(8, 2), head_dim=128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for documents in (find_documents([ids(True)], parts[0].device), whole_rows(*SHAPE, parts[0].device)):
            attend_within(*parts, documents, route.attend).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
