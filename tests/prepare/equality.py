"""Shows that prepare gives tiktoken's ids: chunked, in parallel and with the fast engine, over a lot of mixed text.

    python tests/prepare/equality.py --megabytes 120 --tokenizer gpt2

The text is found on this machine (code, prose, manuals), made of random words in a dozen scripts, or made of strings that are
hard to split. tiktoken encodes each document as a whole, and the files of prepare must have the same ids.
"""

import argparse
import gzip
import random
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prepare.data import load_tokenizer, open_split, read_meta
from prepare.pipeline import prepare
from prepare.plan import Settings
from prepare.tokenizer import BytePairs

SEPARATOR = "\n<|document|>\n"
AT_LINE_START = re.compile("(?<![^\r\n])\ufeff+")
DOCUMENT = 4 << 20
"""Most characters of a document, about; tiktoken needs 30 times as much memory."""

SCRIPTS = {
    "latin": "aeiouàâäéèêëîïôöùûüßñçæœøåłźżščřžőű" + "bcdfghjklmnpqrstvwxyz" * 2,
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяіїєґ",
    "greek": "αβγδεζηθικλμνξοπρστυφχψωάέήίόύώς",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهويةىءآأؤإئ",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשתךםןףץ",
    "devanagari": "कखगघचछजझटठडढतथदधनपफबभमयरलवशषसहािीुूेैोौं्",
    "thai": "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวศษสหอฮะาิีึืุูเแโใไ่้",
    "hangul": "가나다라마바사아자차카타파하한국어글말사람나라물불",
    "kana": "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをんアイウエオカキクケコ",
    "han": "的一是不了人我在有他这中大来上个国和也子时道那要下看天年生会自着去之家学对可里后小么心多没为又",
    "emoji": "😀😂🥰👍🏽🎉🚀🌍🔥✨❤️👩‍💻🇫🇷",
}
CONFUSING = [
    *[" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", " \n ", "\n\n\n "],
    *["a", "The", "'s", "'", "'ll", "'LL", "1", "2345", "½", "é", "e\u0301", "漢字", "_", "<|endoftext|>", "ſ", "K"],
    *[".", "!?", "-", "~", "👍🏽", "\x00", "/", "。", "\ufeff", "x" * 50, "=" * 90, " " * 100, "\ufffd", "\u200b"],
]


def on_this_machine() -> Iterator[str]:
    """Code, prose and manuals, in a fixed order."""
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib")), Path("/usr/share")]
    for root in roots:
        for path in sorted(root.rglob("*")):
            packed = path.suffix == ".gz"
            kind = Path(path.stem).suffix if packed else path.suffix
            if kind in (
                ".py",
                ".pyi",
                ".md",
                ".rst",
                ".txt",
                ".c",
                ".h",
                ".html",
                ".js",
                ".json",
                ".1",
                ".7",
                ".8",
                ".pl",
            ):
                try:
                    data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
                    yield data.decode()
                except (OSError, UnicodeDecodeError, EOFError):
                    continue


def sentences(rng: random.Random) -> Iterator[str]:
    """Random words in one script after another."""
    while True:
        letters = SCRIPTS[rng.choice(list(SCRIPTS))]
        space = "" if letters[0] in "あ的ก" else " "
        words = ("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(1, 400)))
        text = space.join(word.capitalize() if rng.random() < 0.1 else word for word in words)
        yield text + rng.choice([". ", "。", "!\n", "?\n\n", "؟ ", "\n"])


def confusing(rng: random.Random) -> Iterator[str]:
    while True:
        yield "".join(rng.choices(CONFUSING, k=rng.randint(1, 2000)))


def mixed(characters: int, seed: int = 0) -> Iterator[str]:
    """Documents without the separator, a third of each kind if there is enough of it."""
    rng = random.Random(seed)
    longest = min(DOCUMENT, characters // 10)
    machine, made, mad = on_this_machine(), sentences(rng), confusing(rng)
    kinds = [(machine, 0.6), (made, 0.25), (mad, 0.15)]
    while characters > 0:
        kind = rng.choices([k for k, _ in kinds], [share for _, share in kinds])[0]
        document: list[str] = []
        size = 0
        wanted = rng.choice([longest, longest // 20, 300])
        while size < min(wanted, characters):
            text = next(kind, "")
            if not text:
                kind = made
                continue
            document.append(text.replace(SEPARATOR, ""))
            size += len(text)
        characters -= size
        yield AT_LINE_START.sub("", "".join(document))  # prepare leaves such marks out (marks.py)


def differences(
    folder: Path, megabytes: float, tokenizer: str, engine: str, workers: int, seed: int = 0
) -> tuple[int, int, int]:
    """Prepares mixed text below `folder`. Returns bytes of text, tokens, and how many documents have other ids."""
    documents = list(mixed(int(megabytes * 1e6 * 0.75), seed))
    file = folder / "mixed.txt"
    file.write_text(SEPARATOR.join(documents), encoding="utf-8", newline="")
    settings = Settings(tokenizer=tokenizer, separator=SEPARATOR, split="hash", val_fraction=0.5)
    prepare([str(file)], folder, settings, engine_name=engine, workers=workers)
    reference = load_tokenizer(folder)
    assert isinstance(reference, BytePairs)
    eot = read_meta(folder).eot_id
    sides = []
    for side in ("train", "val"):
        ids = open_split(folder, side)
        ends = [*np.flatnonzero(ids == eot).tolist(), len(ids)]
        begins = [0, *(end + 1 for end in ends[:-1])]
        sides.append(iter([ids[begin:end] for begin, end in zip(begins, ends, strict=True)]))
    heads = [next(side, None) for side in sides]
    wrong = tokens = 0
    for document in documents:
        expected = np.array(reference._encoding.encode_ordinary(document), dtype=np.uint32)
        tokens += len(expected)
        for side, head in enumerate(heads):
            if head is not None and np.array_equal(head, expected):
                heads[side] = next(sides[side], None)
                break
        else:
            wrong += 1
    left = sum(head is not None for head in heads)
    return file.stat().st_size, tokens, max(wrong, left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=120)
    parser.add_argument("--tokenizer", default="gpt2", choices=["gpt2", "cl100k_base", "o200k_base"])
    parser.add_argument("--engine", default="fast", choices=["fast", "tiktoken"])
    parser.add_argument("--workers", type=int, default=2)
    flags = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        size, tokens, wrong = differences(Path(folder), flags.megabytes, flags.tokenizer, flags.engine, flags.workers)
    print(
        f"{flags.tokenizer}, {flags.engine}, {flags.workers} workers: {size / 1e6:.1f} MB, {tokens:,} tokens, "
        f"{wrong} documents differ ({time.monotonic() - began:.0f} s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
