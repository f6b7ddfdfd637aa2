"""Quantising and dequantising beside the oracle and beside bitsandbytes, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import quantised_oracle as oracle
import torch
from quantised_models import bytes_of

from megatron_tiedlora.base.shapes import BASE_FORMATS
from megatron_tiedlora.parallel import quantise

BLOCK = 64
WIDTHS = (64, 128, 96, 1376, 100, 7)


def drawn(rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights with a row of zeros, a block of zeros, single large ones and subnormal ones."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 0.02
    values[1] = 0
    values[2, :BLOCK] = 0
    values[3, ::17] *= 40
    values[4] *= 1e-38  # below what nf4 stores
    return values.to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_the_oracles(width: int, dtype: torch.dtype) -> None:
    values = drawn(6, width, dtype)
    codes, scales = quantise.quantise_blocks(values, BLOCK, "nf4")
    expected, expected_scales = oracle.nf4_codes(values.float().numpy())
    assert np.array_equal(scales.numpy(), expected_scales) and np.array_equal(codes.numpy(), expected)
    packed = quantise.pack_codes(codes)
    assert packed.shape == (6, BASE_FORMATS["nf4"].row_bytes(width)) and torch.equal(
        quantise.unpack_codes(packed, width), codes
    )
    values_again = quantise.dequantise_blocks(packed, scales, width, BLOCK, "nf4")
    assert np.array_equal(values_again.numpy(), oracle.nf4_values(values.float().numpy()))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_rows_are_the_oracles(name: str, width: int, dtype: torch.dtype) -> None:
    values = drawn(6, width, dtype)
    codes, scales = quantise.quantise_rows(values, quantise.row_maxima(values), name)
    levels, expected_scales = oracle.row_values(values.float().numpy(), name)
    assert np.array_equal(scales.numpy(), expected_scales) and np.array_equal(codes.float().numpy(), levels)
    again = quantise.dequantise_rows(codes, scales)
    assert np.array_equal(again.numpy(), levels * expected_scales[:, None])
    if name == "fp8":  # the largest weight of a row is on the largest level, and none is beyond
        assert codes.float().abs().amax(1)[[0, 3, 5]].tolist() == [448] * 3


def test_codes_of_fp32_and_bf16_differ() -> None:
    """So a base is quantised from its values as they are stored."""
    values = torch.randn(64, 640, generator=torch.Generator().manual_seed(0))
    both = [quantise.quantise_blocks(values.to(dtype), BLOCK, "nf4")[0] for dtype in (torch.float32, torch.bfloat16)]
    assert 0.002 < (both[0] != both[1]).float().mean() < 0.02


def test_bytes_of_the_table() -> None:
    nf4, int8 = BASE_FORMATS["nf4"], BASE_FORMATS["int8"]
    assert bytes_of(nf4, 10, 4096) * 8 == 10 * 4096 * 4.5 and bytes_of(int8, 10, 4096) == 10 * (4096 + 4)
    assert bytes_of(nf4, 1, 1376, shards_rows=True) * 8 == 1376 * 5, "scales in parts of 32"
    assert bytes_of(nf4, 1, 1376) == 688 + 22 * 4 and bytes_of(nf4, 1, 7) == 4 + 4, "a short last block"
    assert nf4.stored_block(1376, shards_rows=True) == 32 and nf4.stored_block(1376) == 64
    assert set(BASE_FORMATS) == {"int8", "fp8", "nf4"} and all(key == row.name for key, row in BASE_FORMATS.items())


class TestBitsandbytes:
    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def functional() -> Any:
        reason = "bitsandbytes is not installed: pip install 'megatron_tiedlora[quantised]'"
        return pytest.importorskip("bitsandbytes.functional", reason=reason, exc_type=ImportError)

    @pytest.mark.parametrize("width", [64, 128, 1408])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_has_the_same_codes_where_the_width_divides(self, functional: Any, width: int, dtype: torch.dtype) -> None:
        values = drawn(6, width, dtype)
        packed, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        codes, scales = quantise.quantise_blocks(values, BLOCK, "nf4")
        assert torch.equal(quantise.pack_codes(codes).flatten(), packed.flatten())
        assert torch.equal(scales.flatten(), quantise.without_tiny(state.absmax))
        state.absmax = scales.flatten()
        for kind in (torch.float32, torch.bfloat16):
            state.dtype = kind
            ours = quantise.dequantise_blocks(quantise.pack_codes(codes), scales, width, BLOCK, "nf4")
            assert torch.equal(functional.dequantize_4bit(packed, state), ours.to(kind))

    def test_has_the_codes_of_padded_rows_elsewhere(self, functional: Any) -> None:
        values = drawn(6, 100)
        padded = torch.nn.functional.pad(values, (0, 28))
        packed, state = functional.quantize_4bit(padded, blocksize=BLOCK, quant_type="nf4")
        codes, scales = quantise.quantise_blocks(values, BLOCK, "nf4")
        assert torch.equal(quantise.pack_codes(codes), packed.view(6, 64)[:, :50])
        assert torch.equal(scales.flatten(), quantise.without_tiny(state.absmax))
