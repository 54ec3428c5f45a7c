"""Our tokenizers in Hugging Face's format: the content of tokenizer.json. Needs none of their packages.

The ids are the same for any text, even with `<|endoftext|>` in it, which is ordinary text here
(hence split_special_tokens). Text that ours refuses, such as an unknown character of `char`, theirs
refuses too.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any

from prepare.tokenizer import UNKNOWN, BytePairs, Bytes, Characters, Tokenizer, Words

Json = dict[str, Any]


def tokenizer_json(tokenizer: Tokenizer) -> Json:
    """The content of tokenizer.json for `tokenizer`. Raises ValueError for a kind that it cannot express."""
    if isinstance(tokenizer, BytePairs):
        vocabulary = {token: token_text(token) for token in tokenizer.merges}
        model = _bpe({vocabulary[token]: rank for token, rank in tokenizer.merges.items()})
        model["merges"] = [[vocabulary[left], vocabulary[right]] for left, right in merges(tokenizer.merges)]
        split, decoder = [_split(tokenizer.pattern), _BYTE_LEVEL], _BYTE_LEVEL
    elif isinstance(tokenizer, Bytes):
        model = _bpe({token_text(bytes([byte])): byte for byte in range(256)})
        split, decoder = [_BYTE_LEVEL], _BYTE_LEVEL
    elif isinstance(tokenizer, Characters):
        # Without an unk_token, the model refuses unknown words.
        model = _words([tokenizer.decode([id_]) for id_ in range(tokenizer.vocab_size)], "no such word")
        split, decoder = [_split(r"[\s\S]")], {"type": "Fuse"}
    elif isinstance(tokenizer, Words):
        model = _words([tokenizer.decode([id_]) for id_ in range(tokenizer.vocab_size)], UNKNOWN)
        split, decoder = [_split(words_pattern())], {"type": "Fuse"}
    else:
        raise ValueError(f"tokenizer {tokenizer.name} has no form that Hugging Face knows")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokenizer),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that make up a token, in the order of that token.

    tiktoken merges any two neighbours that make up a token, not only the pair that was learned. So
    all splits are listed.
    """
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def token_text(token: bytes) -> str:
    """A token as GPT-2 writes it: a visible character for each byte."""
    return "".join(_VISIBLE[byte] for byte in token)


def words_pattern() -> str:
    """The pattern of `Words` with its character classes written out, since \\w means other characters in their library."""
    word = _class_of(re.compile(r"\w"))
    space = _class_of(re.compile(r"\s"))
    return f" ?[{word}]+| ?[^{word}{space}]|[{space}]"


def _class_of(member: re.Pattern[str]) -> str:
    """All characters that match, as ranges for a [...] class."""
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000 or not member.match(chr(code)):
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\x{{{low:x}}}-\\x{{{high:x}}}" if low < high else f"\\x{{{low:x}}}" for low, high in ranges)


def _visible() -> list[str]:
    """GPT-2's table of bytes: a visible byte is itself, the others follow after U+00FF, in order."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


_VISIBLE = _visible()
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def _bpe(vocabulary: dict[str, int]) -> Json:
    # ignore_merges: a piece that is itself a token becomes that token, as in tiktoken.
    return {"type": "BPE", "byte_fallback": False, "ignore_merges": True, "vocab": vocabulary, "merges": []}


def _words(words: Iterable[str], unknown: str) -> Json:
    return {"type": "WordLevel", "vocab": {word: id_ for id_, word in enumerate(words)}, "unk_token": unknown}


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _added(tokenizer: Tokenizer) -> list[Json]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": id_, "content": text, **plain} for text, id_ in sorted(tokenizer.specials.items())]
