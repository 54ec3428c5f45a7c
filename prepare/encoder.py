"""Exact encoding in bounded memory: the ids are those of the whole text, though no more than a chunk is held."""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from prepare.tokenizer import Tokenizer
from prepare.tokens import DataError

MAX_CHUNK = 64 << 20
"""Characters without a safe cut that we are ready to hold. Needs 2-3 GB while encoding; plain text needs 1/60 of it."""

# Cutting right before a space that follows printable ASCII leaves the ids as they are, for the patterns of gpt2,
# cl100k_base and o200k_base: their matchers run left to right without look-behind, and every alternative that can end
# in a non-space stops at U+0020. After a newline, or before any other space, they do not.
_UP_TO_LAST_SAFE_CUT = re.compile(r"(?s:.*)[!-~](?= )")


def chunks(pieces: Iterable[str]) -> Iterator[str]:
    """The same text, cut where encoding does not notice.

    A chunk ends at the last safe cut of a piece; where a piece has none (Chinese, base64) it grows by the next piece.
    Raises DataError where that makes more than MAX_CHUNK characters.
    """
    held: list[str] = []
    size = 0
    for piece in pieces:
        # A cut exactly between two pieces is not seen: no harm, there is another one soon.
        if cut := _UP_TO_LAST_SAFE_CUT.match(piece):
            yield "".join([*held, cut.group()])
            held, size = [], 0
            piece = piece[cut.end() :]
        held.append(piece)
        size += len(piece)
        if size > MAX_CHUNK:
            raise DataError(
                f"{size:,} characters without an ASCII word followed by a space, from {held[0][:20]!r} on: "
                "put a blank after a full stop here and there, or use --tokenizer char or byte"
            )
    yield "".join(held)


def encode(pieces: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of one text, in order, in arrays of shape (n,), equal in sum to `tokenizer.encode` of the whole text."""
    for chunk in pieces if tokenizer.cuts_anywhere else chunks(pieces):
        yield tokenizer.encode(chunk)
