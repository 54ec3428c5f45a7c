"""The bytes of a file or URL: opened where they lie, unpacked, and either whole or an error.

A stream that ends in the middle looks like one that ends, to whoever asks only for the next bytes. So the end of each is
looked at: of a transfer (as many bytes as were announced), and of each packed member (its own end, its checksum, and
nothing behind it but another member).
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

from backports import zstd

from prepare.tokens import DataError

PIECE_BYTES = 1 << 19
HEAD_BYTES = 1 << 16
"""Of a file, unpacked: enough to see what it is."""
_READ_BYTES = 1 << 16

PACKINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""By the ending of the name; `packing_of` knows them by their first bytes."""
UNPACK = {"gzip": "gzip -dc", "zstd": "zstd -dc --long=31", "bzip2": "bzip2 -dc", "xz": "xz -dc"}
"""The commands that do the same."""

Advance = Callable[[int], None]


class TransferError(OSError):
    """A store or its network failed: trying again may help. The message is one line, as a DataError's is."""


class Damaged(DataError):
    """Bytes are missing or changed. --errors does not cover that: it is for text."""


def packing_of(head: bytes) -> str:
    """How a file that begins so is packed: a value of PACKINGS, or "" where it is not."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    # The second is a frame to skip: what parallel and seekable writers begin with.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (
        head[:1] >= b"\x50" and head[:1] < b"\x60" and head[1:4] == b"\x2a\x4d\x18"
    ):
        return "zstd"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2"
    return "xz" if head.startswith(b"\xfd7zXZ\x00") else ""


def is_stump(data: bytes, packing: str) -> bool:
    """Whether a whole file of these bytes is the beginning of a packed one that was cut within its first bytes."""
    magic = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0"}[packing]
    return len(data) < 10 and (magic.startswith(data) or data.startswith(magic))


def opened(
    place: str, name: str, size: int, packing: str | None, advance: Advance = lambda _: None, *, ahead: bool = True
) -> IO[bytes]:
    """The bytes of what lies at `place` (a path or a URL), unpacked; `packing` None: by its first bytes.

    `size` is the number of bytes it should have, 0 where it is not known. `advance` is told how many of them were read. Reading
    raises Damaged or TransferError with the name and the place where what is there is not whole. Without `ahead`, a store
    is asked for little more than what is read (it may fetch megabytes, else).
    """
    if "://" in place:
        store, path = store_of(place)
        try:
            raw = store.open(path, "rb", **(_how(store, path, size) if ahead else {"block_size": PIECE_BYTES}))
        except Exception as error:
            raise unreachable(name, error) from error
    else:
        raw = open(place, "rb", buffering=0)  # noqa: PTH123, SIM115 - closed by whoever asked
    counted = _Counted(raw, name, size, advance)
    file = io.BufferedReader(counted, PIECE_BYTES)
    if packing is None:
        packing = packing_of(file.peek(_READ_BYTES))
    if not packing:
        return file
    return io.BufferedReader(_Unpacked(file, packing, name, lambda: counted.position), PIECE_BYTES)


def _how(store: Any, path: str, size: int) -> dict[str, Any]:
    """How to open a large file of a web server that cannot send parts of it: as one stream (fsspec would give up)."""
    block: int = getattr(store, "block_size", 0) or 0
    if "http" in store.protocol and size > block and not store.info(path).get("partial"):
        return {"block_size": 0}
    return {}


def head(place: str, name: str, size: int) -> tuple[str, bytes]:
    """How a file is packed ("" where it is not), and its first HEAD_BYTES, unpacked."""
    with opened(place, name, size, "", ahead=False) as file:
        first = read_up_to(file, _READ_BYTES)
    packing = packing_of(first)
    if not packing:
        return "", first
    with opened(place, name, size, packing, ahead=False) as file:
        return packing, read_up_to(file, HEAD_BYTES)


def read_up_to(file: IO[bytes], size: int) -> bytes:
    """`size` bytes, fewer only at the end of the file, however few a read gives."""
    data = file.read(size)
    while data and len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


class _Counted(io.RawIOBase):
    """A file that tells how much of it was read, and does not end before its end."""

    def __init__(self, file: IO[bytes], name: str, size: int, advance: Advance) -> None:
        self.position = 0
        self._file = file
        self._name = name
        self._size = size
        self._advance = advance

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = self._file.seek(offset, whence)
        return self.position

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        except OSError as error:
            if "://" not in self._name and error.filename is None:
                error.filename = self._name
                raise
            raise unreachable(self._name, error, self.position) from error
        except Exception as error:  # each store has kinds of its own
            raise unreachable(self._name, error, self.position) from error
        if not count and len(buffer) and self.position < self._size:
            raise TransferError(
                f"{self._name} ends after {self.position:,} of its {self._size:,} bytes: the transfer broke off, or it is "
                "being written; try again"
            )
        self.position += count
        self._advance(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Gzip:
    """zlib's decompressor with the interface that those of bz2, lzma and zstd have."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)  # with header, CRC and length
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._stream.decompress(self._stream.unconsumed_tail + data, max_length)
        self.needs_input = not self._stream.unconsumed_tail and len(out) < max_length
        return out


def _decompressor(packing: str) -> Any:
    if packing == "gzip":
        return _Gzip()
    if packing == "zstd":  # the window of --long=31: up to 2 GB of memory, for files made so alone
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 31})
    return bz2.BZ2Decompressor() if packing == "bzip2" else lzma.LZMADecompressor(lzma.FORMAT_XZ)


class _Unpacked(io.RawIOBase):
    """The members of a packed file, one after the other. Holds no more than some blocks, however well they were packed."""

    def __init__(self, file: IO[bytes], packing: str, name: str, place: Callable[[], int]) -> None:
        self._file = file
        self._packing = packing
        self._name = name
        self._place = place
        self._member: Any = None
        self._members = 0
        self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._member is None and not self._begin():
                return 0
            if self._member.needs_input and not self._held:
                self._held = self._file.read(_READ_BYTES)
                if not self._held:
                    raise Damaged(
                        f"{self._name} cannot be unpacked: it ends in the middle of a {self._packing} stream, after "
                        f"{self._place():,} bytes; a transfer may have broken off, get it again ({self._rescue()})"
                    )
            try:
                data = self._member.decompress(self._held, len(buffer))
            except (zlib.error, OSError, lzma.LZMAError, zstd.ZstdError, EOFError) as error:
                if "ictionary" in str(error):
                    raise Damaged(
                        f"{self._name} cannot be unpacked: it was packed with a dictionary: zstd -dc -D DICTIONARY unpacks it"
                    ) from error
                raise self._damage(str(error)) from error
            self._held = b""
            if self._member.eof:
                self._held, self._member = self._member.unused_data, None
                self._members += 1
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _begin(self) -> bool:
        """Whether there is one more member."""
        while True:
            self._held = self._held or self._file.read(_READ_BYTES)
            if self._packing in ("gzip", "xz"):  # may be padded with zeros
                padded = bool(self._held)
                self._held = self._held.lstrip(b"\0")
                if padded and not self._held:
                    continue
            if not self._held:
                return False
            if not self._held.startswith({"gzip": b"\x1f", "xz": b"\xfd"}.get(self._packing, b"")):
                raise self._damage(f"no {self._packing} stream begins there")  # zlib and lzma would wait for more bytes
            self._member = _decompressor(self._packing)
            return True

    def _damage(self, reason: str) -> Damaged:
        """At about what was read: decompressors do not tell where in their block they stumbled."""
        where = f"{self._name} cannot be unpacked at about byte {self._place():,} ({reason})"
        if self._members:
            return Damaged(
                f"{where}: what follows {self._members:,} whole {self._packing} stream{'s' * (self._members > 1)} is damaged, "
                f"or something else; get it again ({self._rescue()})"
            )
        return Damaged(f"{where}: it is damaged; get it again ({self._rescue()})")

    def _rescue(self) -> str:
        return f"what can be read of it, {UNPACK[self._packing].split()[0]} -dc gives"

    def close(self) -> None:
        self._file.close()
        super().close()


def store_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path there. Raises DataError where its package is missing."""
    import fsspec  # 0.1 s, for URLs only

    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be opened: {str(error).rstrip('.')}") from error
    store.invalidate_cache()  # from a cache of listings nobody sees that a file has changed
    return store, path


def unreachable(
    url: str, error: Exception, after: int | None = None, *, doing: str = "read"
) -> DataError | TransferError:
    """What to say of a store's error; each has kinds of its own. `after` so many bytes, where some had come."""
    cause = error.__cause__ or error
    reason = str(cause).splitlines()[0] if str(cause).strip() else type(cause).__name__
    place = "" if after is None else f" after {after:,} bytes"
    message = f"{url} cannot be {doing}{place} ({reason}): check the address, your credentials, and try again"
    own = isinstance(cause, PermissionError | FileNotFoundError | ValueError)
    refused = after is None and (own or 400 <= (getattr(cause, "status", 0) or 0) < 500)
    return DataError(message) if refused else TransferError(message)
