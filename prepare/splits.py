"""Divides the text into train and val.

With few documents, val is the tail: the last characters of the whole text. With many, a hash of its
text decides for each document. That depends neither on other documents nor on their order, and
copies of a document end up on the same side. Both sides are encoded separately, so that no token
has text of both.
"""

import hashlib
from collections.abc import Iterator

from prepare.corpus import Piece, count_characters, offset_of_character
from prepare.tokens import DataError

TRAIN, VAL = 0, 1
HEAD_BYTES = 1 << 20
"""At most so many bytes of a document are hashed, so that a longer one does not have to be in memory."""

ENOUGH = 10
"""Documents that the smaller side gets on average, at least: with ten, it is empty once in 20,000 times."""


def many(val_fraction: float) -> int:
    """The number of documents from which on the split is by hash."""
    return int(ENOUGH / min(val_fraction, 1 - val_fraction)) + 1


def by_tail(pieces: Iterator[Piece], border: int) -> Iterator[tuple[int, Piece]]:
    """Gives the first `border` characters to train (side 0), the others to val (side 1)."""
    left = border
    for piece in pieces:
        count = count_characters(piece.data) if left >= 0 else 0
        if left < 0:
            yield VAL, piece
        elif count <= left:  # a piece may begin with the rest of a character
            left -= count
            yield TRAIN, piece
        else:
            cut = offset_of_character(piece.data, left)
            if cut:
                yield TRAIN, piece._replace(data=piece.data[:cut])
            yield VAL, piece._replace(offset=piece.offset + cut, data=piece.data[cut:])
            left = -1


def by_hash(pieces: Iterator[Piece], seed: int, val_fraction: float) -> Iterator[tuple[int, Piece]]:
    """Gives each document as a whole to train (side 0) or val (side 1)."""
    held: list[Piece] = []
    size = 0
    side: int | None = None  # of the current document; None until its hash is known
    for piece in pieces:
        if piece.begins:
            yield from _decided(held, seed, val_fraction)
            held, size, side = [], 0, None
        if side is not None:
            yield side, piece
            continue
        held.append(piece)
        size += len(piece.data)
        if size >= HEAD_BYTES:
            for side, known in _decided(held, seed, val_fraction):
                yield side, known
            held = []
    yield from _decided(held, seed, val_fraction)


def _decided(pieces: list[Piece], seed: int, val_fraction: float) -> Iterator[tuple[int, Piece]]:
    if not pieces:
        return
    head = b"".join(piece.data for piece in pieces)[:HEAD_BYTES]
    digest = hashlib.blake2b(head, digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
    side = VAL if int.from_bytes(digest, "little") < val_fraction * 2**64 else TRAIN
    for piece in pieces:
        yield side, piece


def too_little(tokens: dict[str, int], method: str) -> DataError:
    """The error for a split with too few tokens to train or evaluate on. `tokens`: file name to number of tokens."""
    file = min(tokens, key=lambda name: tokens[name])
    cure = "give more text or another --val-fraction" + (
        ", another --seed, or --split tail" if method == "hash" else ""
    )
    return DataError(
        f"too little text: {file} would get {tokens[file]} tokens and needs 2 at the least "
        f"(one, and the one to predict); {cure}"
    )
