"""Where documents begin and end."""

from __future__ import annotations

import torch
from attention_oracle import IDS

from megatron_tiedlora.model.documents import find_documents, whole_rows

HOST = torch.device("cpu")


def test_a_new_id_and_a_new_row_begin_a_document() -> None:
    found = find_documents(IDS, HOST)
    assert found.bounds == [0, 5, 8, 16, 17, 32] and found.longest == 15
    assert found.offsets.tolist() == found.bounds and found.offsets.dtype == torch.int32


def test_rows_of_one_document_each() -> None:
    rows = whole_rows(3, 7, HOST)
    assert rows.bounds == rows.offsets.tolist() == [0, 7, 14, 21] and rows.longest == 7
    assert rows.offsets.dtype == torch.int32
    found = find_documents(torch.zeros(3, 7, dtype=torch.int64), HOST)
    assert found.bounds == rows.bounds and found.longest == rows.longest
