"""Exact encoding in bounded memory, on all cores.

The ids are those of the whole text and come in order, though no more than a few chunks are in
memory at a time.
"""

import codecs
import ctypes
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from prepare import engine as engines
from prepare import tokenizer as tokenizers
from prepare.corpus import Piece
from prepare.engine import Engine, Fast
from prepare.tokenizer import Tokenizer, Words, endless_blanks
from prepare.tokens import DataError, TokenizerSection

CHUNK = 1 << 19
"""About how many bytes of text a chunk has."""
MAX_CHUNK = 64 << 20
"""Most bytes without a safe cut. Encoding that much at once takes 2-3 GB; ordinary text takes 1/60 of it."""

# Where cutting leaves the ids as they are, for the patterns of gpt2, cl100k_base and o200k_base: their matchers run left
# to right without look-behind, so a cut is safe where both the whole text and its left part end a token.
# Before a space that follows printable ASCII: every alternative that can end in a non-space stops at U+0020.
# After a single newline between two characters that are not blanks: a newline ends every alternative that can hold one,
# but for o200k_base's `[\r\n/]*`, so no `/` may follow. This is for Chinese, Japanese and Korean, which have no spaces.
# Elsewhere (before other spaces, after other newlines) cuts do change ids.
# The characters of these languages have three bytes, E3 to EF first; of them, only U+3000 is a blank. (ED A0 and so on
# are not UTF-8 and may be left out.)
_WIDE = rb"(?:(?!\xe3\x80\x80)[\xe3-\xec\xef][\x80-\xbf]|\xed[\x80-\x9f])[\x80-\xbf]"
_UP_TO_LAST_SAFE_CUT = re.compile(rb"(?s:.*)(?:[!-~](?= )|(?:[!-~]|%b)\n(?=[!-.0-~]|%b))" % (_WIDE, _WIDE))
_UP_TO_LAST_CHARACTER = re.compile(rb"(?s:.*)(?=[^\x80-\xbf])")

TRIM_EVERY = 128
"""Freed memory is given back to the system after so many chunks."""
_SAMPLE_EVERY = 16
_SAMPLE_BYTES = 32 << 10
"""tiktoken encodes so many bytes of every 16th chunk as well: 0.4 % of the text, 3 % of the time."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one document that lies on one side (train or val) and in one chunk."""

    side: int
    parted: bool
    """Whether the end-of-text token comes before it."""
    source: int
    row: int
    offset: int
    """`source`, `row` and `offset` mean the same as in corpus.Piece."""
    data: bytes


@dataclass(frozen=True)
class Chunk:
    """What is encoded in one go: a part of a long document, or many short documents."""

    parts: list[Part]

    @property
    def size(self) -> int:
        return sum(len(part.data) for part in self.parts)

    @property
    def crc(self) -> int:
        """Checksum of the text and of all that decides how it is encoded."""
        crc = 0
        for part in self.parts:
            crc = zlib.crc32(part.data, zlib.crc32(b"%d%d%d" % (part.side, part.parted, part.source), crc))
        return crc


@dataclass
class Coded:
    """The tokens of a chunk."""

    ids: list[bytes]
    """For each side, the bytes that go to its file."""
    repaired: dict[int, int] = field(default_factory=dict)
    """Index of a source to the number of places that were not valid UTF-8."""
    unknown: int = 0
    """How many ids are <unk>."""


class BadText(Exception):
    """A byte that is not UTF-8. Its arguments: source, row and offset (as in corpus.Piece), and its value."""


class WrongIds(DataError):
    """The fast engine gave a wrong id. It may have done so in other chunks too."""


class Chunker:
    """Cuts text into chunks at places that do not change its ids, and counts the documents and bytes of both sides.

    A chunk ends at the last safe cut of a piece. If a piece has none (Chinese, base64), the next
    piece is added to it. The chunks of a text are always the same.
    """

    def __init__(self, *, cuts_anywhere: bool) -> None:
        """`cuts_anywhere`: see Tokenizer.cuts_anywhere."""
        self.documents = [0, 0]
        self.bytes = [0, 0]
        self._cut = _UP_TO_LAST_CHARACTER if cuts_anywhere else _UP_TO_LAST_SAFE_CUT

    def chunks(self, pieces: Iterable[tuple[int, Piece]]) -> Iterator[Chunk]:
        """The chunks of `pieces`, each of which comes with its side (0 train, 1 val).

        Raises DataError if a document has more than MAX_CHUNK bytes without a safe cut.
        """
        parts: list[Part] = []
        whole = 0  # bytes in `parts`
        held: list[bytes] = []  # text of the document that is being read
        size = 0
        side, parted, source, row, offset = -1, False, 0, 0, 0  # these describe `held`

        def close(more: bytes | memoryview = b"") -> None:
            nonlocal held, size, whole, parted, offset
            if held or more:
                parts.append(Part(side, parted, source, row, offset, b"".join([*held, more])))
                whole += size + len(more)
                offset += size + len(more)
            held, size, parted = [], 0, False

        for now, piece in pieces:
            if piece.begins or now != side:
                close()
                side, parted = now, self.documents[now] > 0
                source, row, offset = piece.source, piece.row, piece.offset
                self.documents[now] += 1
            data = piece.data
            self.bytes[now] += len(data)
            # A safe cut exactly between two pieces is not found; there will be another one soon.
            cut = self._cut.match(data) if whole + size + len(data) >= CHUNK else None
            if cut:
                close(memoryview(data)[: cut.end()])
                data = data[cut.end() :]
            if parts and (cut or whole >= CHUNK):
                yield Chunk(parts)
                parts, whole = [], 0
            held.append(data)
            size += len(data)
            if size > MAX_CHUNK:
                raise DataError(
                    f"{size:,} bytes without an ASCII word followed by a space, nor a line of text, from "
                    f"{held[0][:60].decode('utf-8', 'replace')[:20]!r} on: put a blank after a full stop here and there, "
                    "or use --tokenizer char or byte"
                )
        close()
        if parts:
            yield Chunk(parts)


def decoded(data: bytes, errors: str) -> tuple[str, int]:
    """Decodes UTF-8. Returns the text and the number of places that were not valid UTF-8.

    Such a place becomes U+FFFD if `errors` is "replace", and is left out if it is "skip". Raises
    UnicodeDecodeError at the first one if it is "strict".
    """
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        if errors == "strict":
            raise
    places = 0

    def repair(error: UnicodeError) -> tuple[str, int]:
        nonlocal places
        assert isinstance(error, UnicodeDecodeError)
        places += 1
        return ("\ufffd" if errors == "replace" else ""), error.end

    name = f"prepare-{threading.get_ident()}"
    codecs.register_error(name, repair)
    return data.decode("utf-8", name), places


class Coder:
    """Encodes chunks."""

    def __init__(self, tokenizer: Tokenizer, engine: Engine, dtype: str, errors: str) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.errors = errors

    def __call__(self, chunk: Chunk, number: int = 0) -> Coded:
        """The tokens of a chunk. Every 16th `number` (its index among all chunks) is also checked against tiktoken.

        Raises BadText or WrongIds, or DataError if the text cannot be encoded.
        """
        coded = Coded([])
        texts = []
        for part in chunk.parts:
            try:
                text, places = decoded(part.data, self.errors)
            except UnicodeDecodeError as error:
                raise BadText(part.source, part.row, part.offset + error.start, part.data[error.start]) from None
            if places:
                coded.repaired[part.source] = coded.repaired.get(part.source, 0) + places
            texts.append(text)
        ids = self.engine(texts)
        if isinstance(self.engine, Fast) and number % _SAMPLE_EVERY == 0:
            self._compare(texts, ids)
        eot = np.array([] if self._tokenizer.eot_id is None else [self._tokenizer.eot_id], dtype=self.dtype)
        sides: list[list[np.ndarray]] = [[], []]
        for part, tokens in zip(chunk.parts, ids, strict=True):
            if tokens.size and (largest := tokens.max()) >= self._tokenizer.vocab_size:
                raise WrongIds(
                    f"{self.engine.name} made id {largest}, the vocabulary ends at {self._tokenizer.vocab_size - 1}: "
                    "use --engine tiktoken"
                )
            if isinstance(self._tokenizer, Words):
                coded.unknown += int(np.count_nonzero(tokens == 0))
            if part.parted:
                sides[part.side].append(eot)
            sides[part.side].append(tokens.astype(self.dtype))
        coded.ids = [b"".join(array.data for array in arrays) for arrays in sides]
        return coded

    def _compare(self, texts: Sequence[str], ids: Sequence[np.ndarray]) -> None:
        """Encodes the beginning of the chunk with tiktoken too. Raises WrongIds if an id differs."""
        left = _SAMPLE_BYTES
        for text, fast in zip(texts, ids, strict=True):
            if len(text) > left:
                cut = _UP_TO_LAST_SAFE_CUT.match(text[:left].encode())
                text = cut.group().decode() if cut else ""
            if not endless_blanks(text):
                reference = self._tokenizer.encode(text)
                if not np.array_equal(fast[: len(reference)], reference):
                    raise WrongIds(
                        f"{self.engine.name} does not give tiktoken's ids for {text[:30]!r}...: use --engine tiktoken, "
                        "and tell us the text"
                    )
            left -= len(text)
            if left <= 0:
                return


def encode(
    chunks: Iterable[tuple[int, Chunk]], coder: Coder, workers: int, section: TokenizerSection, folder: Path
) -> Iterator[tuple[Chunk, Coded]]:
    """Encodes numbered chunks with `workers` workers. Yields each chunk with its tokens, in order.

    At most `workers` + 2 chunks are in memory. The fast engine works in threads, since it releases
    Python's lock; all other tokenizers work in processes, which load the tokenizer that `section`
    describes from `folder`.
    """
    if workers == 1:
        for number, chunk in chunks:
            yield chunk, coder(chunk, number)
        return
    pool: Executor
    call: Callable[[Chunk, int], Coded]
    if isinstance(coder.engine, Fast):
        pool, call = ThreadPoolExecutor(workers), coder
    else:
        settings = (section, folder, coder.dtype.name, coder.errors)
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_work, initargs=settings)
        call = _work
    under_way: deque[tuple[Chunk, Future[Coded]]] = deque()
    try:
        for number, chunk in chunks:
            with _ctrl_c_later():
                under_way.append((chunk, pool.submit(call, chunk, number)))
            if len(under_way) >= workers + 2:
                chunk, future = under_way.popleft()
                yield chunk, future.result()
        while under_way:
            chunk, future = under_way.popleft()
            yield chunk, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, by want of memory perhaps: run the same command again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Holds back Ctrl-C while worker processes start: until they ignore it, they would print tracebacks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_coder: Coder


def _begin_work(section: TokenizerSection, folder: Path, dtype: str, errors: str) -> None:
    """Runs first in each worker process."""
    global _coder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends this process
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A parent that is killed cannot end its workers, so they watch it.
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    tokenizer = tokenizers.from_section(section, folder)
    _coder = Coder(tokenizer, engines.choose("tiktoken", tokenizer, folder), dtype, errors)


def _work(chunk: Chunk, number: int) -> Coded:
    if number % TRIM_EVERY < 2:
        give_memory_back()
    return _coder(chunk, number)


def give_memory_back() -> None:
    """Gives freed memory back to the system. glibc would keep it, and the process would grow by half."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # only glibc has it
        trim(0)
