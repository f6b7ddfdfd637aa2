"""Attention within documents: against a mask over whole rows, and a GPU's kernel against one document after another."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from megatron_tiedlora.model.documents import _runs_kernels, attend_within, find_documents

IDS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 8, [0] * 1 + [1] * 15])
HOST = torch.device("cpu")


def heads(dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Queries of 6 heads, keys and values of 2, as views of one storage by tokens."""
    fused = torch.randn(2, 16, 10, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return list(fused.transpose(1, 2).split((6, 2, 2), dim=1))


def test_a_new_id_and_a_new_row_begin_a_document() -> None:
    found = find_documents(IDS, HOST, dtype=torch.float32, head_dim=32)
    assert found.bounds == [0, 5, 8, 16, 17, 32] and found.longest == 15 and found.kernel is None
    assert found.offsets.tolist() == found.bounds and found.offsets.dtype == torch.int32


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "found"),
    [
        ("cuda", torch.bfloat16, 128, (8, 0), True),
        ("cuda", torch.float16, 256, (9, 0), True),
        ("cuda", torch.bfloat16, 128, (7, 5), False),  # Turing: flash_attn can be installed there, and refuses to run
        ("cuda", torch.bfloat16, 264, (9, 0), False),
        ("cuda", torch.float32, 128, (9, 0), False),
        ("cpu", torch.bfloat16, 128, (9, 0), False),
    ],
)
def test_where_a_kernel_runs(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    found: bool,
) -> None:
    """Nowhere does a run stop for want of one: documents are then attended one after another."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _runs_kernels(torch.device(device), dtype, head_dim) == found


def test_none_sees_another() -> None:
    """Values and gradients are those of a mask over whole rows."""
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    mask = (IDS[:, None, :, None] == IDS[:, None, None, :]) & causal
    query, key, value = (part.detach().requires_grad_() for part in heads(torch.float64))
    documents = find_documents(IDS, HOST, dtype=torch.float64, head_dim=32)
    wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    found = attend_within(query, key, value, documents)
    torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(2), rtol=1e-12, atol=1e-12)
    gradient = torch.randn(found.shape, dtype=torch.float64)
    ours = torch.autograd.grad(found, (query, key, value), gradient)
    theirs = torch.autograd.grad(wanted.transpose(1, 2).flatten(2), (query, key, value), gradient)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_kernel_gives_what_documents_one_by_one_give() -> None:
    parts = heads(torch.bfloat16, "cuda")
    documents = find_documents(IDS, torch.device("cuda"), dtype=torch.bfloat16, head_dim=32)
    if documents.kernel is None:
        pytest.skip("neither flash_attn nor PyTorch has a kernel for documents of different lengths here")
    one_by_one = attend_within(*parts, documents._replace(kernel=None))
    torch.testing.assert_close(attend_within(*parts, documents), one_by_one, rtol=2e-2, atol=2e-2)
