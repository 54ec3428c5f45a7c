"""Train and val: on which side of the border text lies, and how each side becomes tokens.

The border is a hard one: each side is encoded by itself, so that no token holds text of both.
"""

import numpy as np

from prepare.corpus import Document
from prepare.encoder import encode
from prepare.tokenizer import Tokenizer
from prepare.tokens import DataError, Split, TokenWriter


class Side:
    """Encodes the documents of one split into its file, the end-of-text token between them."""

    def __init__(self, coder: Tokenizer, writer: TokenWriter) -> None:
        self._coder = coder
        self._writer = writer
        self._documents = 0
        self._bytes = 0

    def add(self, document: Document) -> int:
        """Appends a document, or the part of one that lies on this side. Returns its characters (0: no document)."""
        characters = 0

        def counted() -> Document:
            nonlocal characters
            for piece in document:
                if piece and not characters:
                    self._begin()
                characters += len(piece)
                self._bytes += len(piece.encode())
                yield piece

        for ids in encode(counted(), self._coder):
            self._writer.write(ids)
        return characters

    def result(self, file: str) -> Split:
        """Raises DataError where there are too few tokens to train on or to evaluate."""
        if self._writer.tokens < 2:
            raise DataError(
                f"too little text: {file} would get {self._writer.tokens} tokens and needs 2 at the least "
                "(one, and the one to predict); give more text or another --val-fraction"
            )
        return Split(file, self._writer.tokens, self._documents, self._bytes, self._writer.sha256)

    def _begin(self) -> None:
        if self._documents and self._coder.eot_id is not None:
            self._writer.write(np.array([self._coder.eot_id], dtype=np.uint32))
        self._documents += 1


def head_and_tail(document: Document, size: int) -> tuple[Document, Document]:
    """The first `size` characters (none where it is below 1) and the others. The head must be read to its end first."""
    rest: list[str] = []

    def head() -> Document:
        left = max(0, size)
        for piece in document:
            if len(piece) > left:
                rest.append(piece[left:])
                yield piece[:left]
                return
            left -= len(piece)
            yield piece

    def tail() -> Document:
        yield from rest
        yield from document

    return head(), tail()
