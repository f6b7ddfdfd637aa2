"""The backward pass of a loss inside its forward pass."""

from __future__ import annotations

import torch

from megatron_tiedlora.parallel.backward import run_with_early_backward


def test_an_early_backward_pass_is_for_its_input_alone() -> None:
    """The factor that comes in later scales the gradient; another tensor gets none, rather than an unscaled one."""
    hidden, other = torch.arange(3.0, requires_grad=True), torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    factor, frozen = torch.tensor([1.0, 0.5, 2.0], requires_grad=True), torch.ones(3)

    def function(inner: torch.Tensor, nothing: None, factor: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        assert nothing is None
        return (inner * inner * factor * frozen * other).sum()

    loss = run_with_early_backward(function, hidden * 1, None, factor, frozen)
    assert loss.item() == 33.0 and hidden.grad is None
    (loss / 8).backward()
    expected = 2 * hidden * other * factor / 8, hidden * hidden * other / 8
    for found, gradient in zip((hidden.grad, factor.grad), expected, strict=True):
        torch.testing.assert_close(found, gradient.detach(), rtol=0, atol=0)
    assert other.grad is None and frozen.grad is None
