"""Packs documents into sequences of a fixed length.

Both packings read a stream of documents, int32 [T] with T >= 2, and give sequences of
`sequence_length + 1` tokens, which become fields of length S = sequence_length. A document has
its prompt's tokens as `~id`: they are read, but are no targets.

    tokens       int32 [S]    the sequence without its last token
    targets      int32 [S]    the sequence without its first token: the tokens to predict
    segment_ids  int32 [S]    1, 2, ... for the documents of the sequence; 0 in padding
    positions    int32 [S]    0, 1, ... within each segment; 0 in padding
    weights      float32 [S]  1 where the target belongs to the token's segment and not to a
                              prompt, otherwise 0
"""

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


def to_sequences(
    documents: grain.IterDataset[np.ndarray], packing: str, sequence_length: int
) -> grain.IterDataset[Fields]:
    """Turns a stream of documents into a stream of sequences.

    The packing `"pack"` fills sequences with documents end to end, split where a sequence ends
    (each piece is its own segment); `"document"` starts each sequence with a new document and
    drops what does not fit.
    """
    length = sequence_length + 1
    if packing == "document":
        return documents.map(functools.partial(_document_sequence, length=length))
    # Saved positions of the stream contain the key "row", so its name must not change.
    packed = grain.experimental.ConcatThenSplitIterDataset(
        documents.map(lambda tokens: {"row": tokens}), length_struct={"row": length}
    )
    return packed.map(lambda x: _to_fields(x["row"], x["row_segment_ids"], x["row_positions"]))


def empty_batch(batch_size: int, sequence_length: int) -> Fields:
    """Returns sequences of padding only: the fields [batch_size, S], all zero."""
    return {name: np.zeros((batch_size, sequence_length), FIELDS[name]) for name in FIELDS}


def _document_sequence(tokens: np.ndarray, length: int) -> Fields:
    size = min(len(tokens), length)
    sequence, segment_ids, positions = np.zeros((3, length), np.int32)
    sequence[:size] = tokens[:size]
    segment_ids[:size] = 1
    positions[:size] = np.arange(size)
    return _to_fields(sequence, segment_ids, positions)


def _to_fields(sequence: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> Fields:
    own, next_ = segment_ids[:-1], segment_ids[1:]
    is_prompt = sequence < 0
    sequence = np.where(is_prompt, ~sequence, sequence)
    return {
        "tokens": sequence[:-1],
        "targets": sequence[1:],
        "segment_ids": own,
        "positions": positions[:-1],
        "weights": ((own == next_) & (own > 0) & ~is_prompt[1:]).astype(np.float32),
    }
