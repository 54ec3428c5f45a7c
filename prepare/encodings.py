"""Bytes that are not UTF-8: what encoding they seem to be in, or that they are not text at all."""

import codecs
import re

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r\f\v\b\x1a\x1b")) + b"\x7f"
_HALVES = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")  # a character as two of UTF-16
_NO_WINDOWS_1252 = b"\x81\x8d\x8f\x90\x9d"


def is_utf8(head: bytes) -> bool:
    """Whether it is UTF-8, but for a character that is cut at the end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def is_binary(head: bytes) -> bool:
    """Whether there is more of what text does not have than an accident explains."""
    if is_utf8(head):
        return head.count(0) * 10 > len(head)
    return (len(head) - len(head.translate(None, _CONTROLS))) * 20 > len(head)


def wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32, as iconv calls them, with their byte order where there is no mark that tells; else ""."""
    for mark, name in _MARKS:
        # No text begins with FF FE or FE FF but in UTF-16. UTF-32's mark could be the one of UTF-16 and a NUL.
        if head.startswith(mark) and (name == "UTF-16" or head == mark or _likeness(head, name.lower()) > 0):
            return name
    if not head.count(0) or (is_utf8(head) and not is_binary(head)):
        return ""
    controls = len(head) - len(head.translate(None, _CONTROLS))
    # Of ASCII text every second byte would be zero, or more.
    if head.isascii() and controls == head.count(0) and head.count(0) * 4 < len(head):
        return ""
    likeness = {name: _likeness(head, name.lower()) for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE")}
    best = max(likeness, key=lambda name: likeness[name])
    return best if likeness[best] > 0.05 else ""  # lower where numbers lie in a file


def _likeness(head: bytes, encoding: str) -> float:
    """How much like text `head` is in an encoding: the share of its commonest characters, 0 where it cannot be text."""
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
    """What text of 8 bits a character (or of East Asia's older encodings) seems to be, as iconv calls it; "" if UTF-8.

    For text that has some valid UTF-8 beyond ASCII and some errors, too: that is damaged, not encoded otherwise.
    """
    if is_utf8(data):
        return ""
    if _HALVES.search(data) and is_utf8(_HALVES.sub(b"", data)):
        return "CESU-8"
    beyond = [c for c in data.decode("utf-8", "ignore") if c > "\x7f"]
    high = sum(b > 0x7F for b in data)
    if len(beyond) * 4 > high:  # each takes two bytes or more
        return ""
    if high * 5 > len(data):  # not mostly ASCII: no language of Western Europe
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
    # EBCDIC: a blank is 0x40, and most letters lie where Latin-1 has controls and signs.
    if data.count(0x40) * 20 > len(data) and not data.count(0x20) and high * 2 > len(data):
        return "IBM037"
    return "ISO-8859-1" if any(b in _NO_WINDOWS_1252 for b in data) else "WINDOWS-1252"
