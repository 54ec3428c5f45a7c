"""Reads a file or URL, unpacked. The bytes are either whole or an error.

If one only asks for the next bytes, a stream that was cut looks like one that ends. So each end is
checked: a transfer has to have as many bytes as were announced, and each packed member an end and a
checksum, with only another member behind it.
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
"""Unpacked bytes from the beginning of a file: enough to see what it is."""
_READ_BYTES = 1 << 16

PACKINGS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
"""Ending of a name to the packing. `packing_of` finds the packing by the first bytes."""
UNPACK = {"gzip": "gzip -dc", "zstd": "zstd -dc --long=31", "bzip2": "bzip2 -dc", "xz": "xz -dc"}
"""Packing to a shell command that unpacks it."""

Advance = Callable[[int], None]


class TransferError(OSError):
    """A store or the network failed; trying again may help. The message is one line, as that of a DataError."""


class Damaged(DataError):
    """Bytes are missing or changed. --errors does not apply: it is for bad text."""


def packing_of(head: bytes) -> str:
    """How a file that begins with `head` is packed: a value of PACKINGS, or ""."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    # The second is a skippable frame, with which parallel and seekable writers begin.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (
        head[:1] >= b"\x50" and head[:1] < b"\x60" and head[1:4] == b"\x2a\x4d\x18"
    ):
        return "zstd"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2"
    return "xz" if head.startswith(b"\xfd7zXZ\x00") else ""


def is_stump(data: bytes, packing: str) -> bool:
    """Whether `data`, all of a file, is a packed file that was cut within its first bytes."""
    magic = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0"}[packing]
    return len(data) < 10 and (magic.startswith(data) or data.startswith(magic))


def opened(
    place: str, name: str, size: int, packing: str | None, advance: Advance = lambda _: None, *, ahead: bool = True
) -> IO[bytes]:
    """Opens a file or URL for reading, unpacked.

    Args:
        place: its path or URL.
        name: what the user called it.
        size: bytes that it should have, as stored; 0 if not known.
        packing: a value of PACKINGS, or "" if it is not packed. None: found by its first bytes.
        advance: called with the number of stored bytes that were read since its last call.
        ahead: whether a store may read ahead, which can be megabytes.

    Reading raises Damaged or TransferError, with the name and the place, if the file is not whole.
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
    """Options that open a large file of a web server that cannot send parts: as one stream, else fsspec gives up."""
    block: int = getattr(store, "block_size", 0) or 0
    if "http" in store.protocol and size > block and not store.info(path).get("partial"):
        return {"block_size": 0}
    return {}


def head(place: str, name: str, size: int) -> tuple[str, bytes]:
    """How a file is packed ("" if it is not), and its first HEAD_BYTES bytes, unpacked."""
    with opened(place, name, size, "", ahead=False) as file:
        first = read_up_to(file, _READ_BYTES)
    packing = packing_of(first)
    if not packing:
        return "", first
    with opened(place, name, size, packing, ahead=False) as file:
        return packing, read_up_to(file, HEAD_BYTES)


def read_up_to(file: IO[bytes], size: int) -> bytes:
    """Reads `size` bytes; fewer only at the end of the file, even if single reads give less."""
    data = file.read(size)
    while data and len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


class _Counted(io.RawIOBase):
    """A file that counts what was read of it, and raises TransferError if it ends too early."""

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
        except Exception as error:  # each store has its own kinds of errors
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
    """zlib's decompressor with the interface of those of bz2, lzma and zstd."""

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
    if packing == "zstd":  # the window of --long=31: up to 2 GB of memory, but only for files that were packed with it
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 31})
    return bz2.BZ2Decompressor() if packing == "bzip2" else lzma.LZMADecompressor(lzma.FORMAT_XZ)


class _Unpacked(io.RawIOBase):
    """The unpacked members of a packed file, one after the other. Has no more than a few blocks in memory."""

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
        """Begins the next member. Returns whether there is one."""
        while True:
            self._held = self._held or self._file.read(_READ_BYTES)
            if self._packing in ("gzip", "xz"):  # zeros may follow a member as padding
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
        """The error for damage near the current place; decompressors do not tell the exact one."""
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
    """The fsspec file system of a URL, and the path in it. Raises DataError if its package is not installed."""
    import fsspec  # takes 0.1 s and is needed for URLs only

    try:
        store, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url} cannot be opened: {str(error).rstrip('.')}") from error
    store.invalidate_cache()  # a cached listing would hide that a file has changed
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
