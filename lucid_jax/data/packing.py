"""From documents (tokens) to rows of a model batch.

Both packings read a stream of int32 [T] documents with T >= 2 and give rows of
`sequence_length + 1` tokens, which become fields of length S = sequence_length:

    tokens       int32 [S]    the row without its last token
    targets      int32 [S]    the row without its first token: what to predict
    segment_ids  int32 [S]    1, 2, ... for the documents of the row; 0 in padding
    positions    int32 [S]    0, 1, ... within each segment; 0 in padding
    weights      float32 [S]  1 where the target belongs to the token's segment
"""

from __future__ import annotations

import functools

import grain
import numpy as np

FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "weights": np.float32,
}

Fields = dict[str, np.ndarray]


def to_rows(
    documents: grain.IterDataset[np.ndarray], packing: str, sequence_length: int
) -> grain.IterDataset[Fields]:
    """Rows of a stream of documents.

    Args:
      documents: tokens, int32 [T], T >= 2.
      packing: `"pack"` fills rows with documents end to end, cut where a row
        ends (each piece is a segment of its own); `"document"` starts each row
        with a new document and drops what does not fit.
      sequence_length: S.
    """
    length = sequence_length + 1
    if packing == "document":
        return documents.map(functools.partial(_document_row, length=length))
    packed = grain.experimental.ConcatThenSplitIterDataset(
        documents.map(lambda tokens: {"row": tokens}), length_struct={"row": length}
    )
    return packed.map(
        lambda row: _to_fields(row["row"], row["row_segment_ids"], row["row_positions"])
    )


def empty_rows(rows: int, sequence_length: int) -> Fields:
    """`rows` rows of nothing but padding, [rows, S]."""
    return {name: np.zeros((rows, sequence_length), dtype) for name, dtype in FIELDS.items()}


def _document_row(tokens: np.ndarray, length: int) -> Fields:
    size = min(len(tokens), length)
    row, segment_ids, positions = np.zeros((3, length), np.int32)
    row[:size] = tokens[:size]
    segment_ids[:size] = 1
    positions[:size] = np.arange(size)
    return _to_fields(row, segment_ids, positions)


def _to_fields(row: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> Fields:
    here, next_ = segment_ids[:-1], segment_ids[1:]
    return {
        "tokens": row[:-1],
        "targets": row[1:],
        "segment_ids": here,
        "positions": positions[:-1],
        "weights": ((here == next_) & (here > 0)).astype(np.float32),
    }
