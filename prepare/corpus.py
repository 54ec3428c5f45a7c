"""Where text comes from: files, or the sample.

A source holds documents, a document is an iterator of pieces of text. Nothing is ever held whole: a source is read once
to be measured and again for each pass over it.
"""

import codecs
import difflib
import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prepare.tokens import DataError, Input

PIECE_BYTES = 1 << 20

Document = Iterator[str]


@dataclass(frozen=True)
class Source:
    """Something to read documents from, as often as needed."""

    name: str
    documents: Callable[[], Iterator[Document]]


def text_file(path: Path) -> Source:
    """A UTF-8 text file: one document. Raises DataError where `path` is no readable file."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: name its files, for example {path / '*.txt'}")
    if not path.exists():
        folder = path.parent
        names = [entry.name for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {folder / near[0]}?" if near else "check the path, or try --sample"
        raise DataError(f"no such file: {path} ({hint})")
    if not path.is_file():
        raise DataError(f"{path} is a pipe or a device, and text is read more than once: save it to a file first")
    return Source(str(path), lambda: iter([_decoded(path)]))


def sample() -> Source:
    """The topics of Python's own documentation: 79 documents, 0.46 MB of real English in Python 3.11."""
    from pydoc_data.topics import topics  # 0.5 MB of text: loaded only where it is wanted

    texts = [topics[topic] for topic in sorted(topics)]
    return Source(f"pydoc_data.topics of Python {platform.python_version()}", lambda: (iter([text]) for text in texts))


def pieces_of(sources: Iterable[Source]) -> Iterator[str]:
    """All the text there is, in order, the borders between documents forgotten."""
    return (piece for source in sources for document in source.documents() for piece in document)


def measure(source: Source, advance: Callable[[int], None]) -> Input:
    """Reads `source` to its end; `advance` is told the bytes read. Raises DataError where it is empty or not UTF-8."""
    reading = Reading(source, advance)
    for document in reading.documents():
        for _ in document:
            pass
    if not reading.characters:
        raise DataError(f"{source.name} is empty: there is nothing to learn from")
    return reading.result()


class Reading:
    """Passes the documents of a source through and measures them on the way.

    The bytes are those of the text's UTF-8, which are the file's own: decoding is strict and newlines are left alone.
    """

    def __init__(self, source: Source, advance: Callable[[int], None]) -> None:
        self.characters = 0
        self._source = source
        self._advance = advance
        self._documents = 0
        self._bytes = 0
        self._hash = hashlib.sha256()

    def documents(self) -> Iterator[Document]:
        for document in self._source.documents():
            self._documents += 1
            yield self._measured(document)

    def result(self) -> Input:
        """What passed through so far."""
        return Input(self._source.name, self._documents, self.characters, self._bytes, self._hash.hexdigest())

    def _measured(self, document: Document) -> Document:
        for piece in document:
            data = piece.encode()
            self._hash.update(data)
            self._bytes += len(data)
            self.characters += len(piece)
            self._advance(len(data))
            yield piece


def _decoded(path: Path) -> Document:
    """The text of a file in pieces of about 1 MiB, each character whole. Raises DataError at the first bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    with path.open("rb") as file:
        while True:
            block = file.read(PIECE_BYTES)
            held = len(decoder.getstate()[0])  # bytes of a character that the last block cut
            try:
                piece = decoder.decode(block, final=not block)
            except UnicodeDecodeError as err:
                at = offset - held + err.start
                bad = f"byte {at:,} is 0x{err.object[err.start]:02x}"
                raise DataError(f"{path} is not UTF-8 text: {bad}; convert it (iconv -t UTF-8) or unpack it") from err
            if not block:
                return
            yield piece
            offset += len(block)
