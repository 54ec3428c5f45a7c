"""Guesses what bytes that are not UTF-8 are: text in another encoding, or no text at all."""

import codecs
import re

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\v\b\x1a\x1b")) + b"\x7f"
_HALVES = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")  # a character as its two UTF-16 halves
_NO_WINDOWS_1252 = b"\x81\x8d\x8f\x90\x9d"


def is_utf8(head: bytes) -> bool:
    """Whether `head` is UTF-8. Its last character may be cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def is_binary(head: bytes) -> bool:
    """Whether `head` has too many control characters to be text."""
    if is_utf8(head):
        return head.count(0) * 10 > len(head)
    return (len(head) - len(head.translate(None, _CONTROLS))) * 20 > len(head)


def wide_encoding(head: bytes) -> str:
    """The name that iconv has for the UTF-16 or UTF-32 of `head`; "" if it is neither.

    The name includes the byte order (UTF-16LE) if no byte order mark tells it.
    """
    for mark, name in _MARKS:
        # No text begins with FF FE or FE FF but in UTF-16. UTF-32's mark could be the one of UTF-16 and a NUL.
        if head.startswith(mark) and (name == "UTF-16" or head == mark or _likeness(head, name.lower()) > 0):
            return name
    if not head.count(0) or (is_utf8(head) and not is_binary(head)):
        return ""
    controls = len(head) - len(head.translate(None, _CONTROLS))
    # ASCII text in UTF-16 has a zero in at least every second byte.
    if head.isascii() and controls == head.count(0) and head.count(0) * 4 < len(head):
        return ""
    likeness = {name: _likeness(head, name.lower()) for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")}
    best = max(likeness, key=lambda name: likeness[name])
    return best if likeness[best] > 0.05 else ""  # files of binary numbers score lower


def _likeness(head: bytes, encoding: str) -> float:
    """How much `head` looks like text in an encoding: the share of common characters, 0 if it cannot be text."""
    width = 4 if "32" in encoding else 2
    try:
        text = (
            codecs.getincrementaldecoder(encoding)().decode(head[: len(head) // width * width]).removeprefix("\ufeff")
        )
    except UnicodeDecodeError:
        return 0
    strange = sum(not (c.isprintable() or c in "\t\n\r\f\v") for c in text)
    common = sum(
        c in "\t\n\r" or " " <= c <= "~" or "\u3000" <= c <= "\u30ff" or "\uff00" <= c <= "\uffef" for c in text
    )
    return 0 if not text or strange * 20 > len(text) else (1 + common) / len(text)


def narrow_encoding(data: bytes) -> str:
    """Guesses the 8-bit or older East Asian encoding of `data`, by the name that iconv has for it.

    Returns "" for UTF-8, and for text with some valid UTF-8 beyond ASCII and some errors: that is
    damaged UTF-8.
    """
    if is_utf8(data):
        return ""
    if _HALVES.search(data) and is_utf8(_HALVES.sub(b"", data)):
        return "CESU-8"
    beyond = [c for c in data.decode("utf-8", "ignore") if c > "\x7f"]
    high = sum(b > 0x7F for b in data)
    if len(beyond) * 4 > high:  # each of them takes at least two bytes
        return ""
    if high * 5 > len(data):  # less than 80 % ASCII: not a language of Western Europe
        from charset_normalizer import from_bytes

        candidates = [
            "cp1251",
            "koi8_r",
            "shift_jis",
            "euc_jp",
            "gb18030",
            "big5",
            "euc_kr",
            "cp1253",
            "cp1255",
            "cp1256",
        ]
        if best := from_bytes(data, cp_isolation=candidates).best():
            return best.encoding.replace("_", "-").replace("cp125", "windows-125").upper()
    # EBCDIC: a space is 0x40, and most letters are above 0x7F.
    if data.count(0x40) * 20 > len(data) and not data.count(0x20) and high * 2 > len(data):
        return "IBM037"
    return "ISO-8859-1" if any(b in _NO_WINDOWS_1252 for b in data) else "WINDOWS-1252"
