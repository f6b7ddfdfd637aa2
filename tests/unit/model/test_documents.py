"""Where documents begin and end."""

from __future__ import annotations

import torch
from attention_oracle import IDS

from megatron_tiedlora.model.batch import find_documents, whole_rows

HOST = torch.device("cpu")


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
