"""not_text.py: a file that is not text is named in one line, and each command that is printed runs as printed."""

import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from prepare import prepare as room
from prepare.frontdoor import printable
from prepare.not_text import NoText, quoted
from prepare.sources import find
from tests.prepare.test_formats import PACK, RECORDS, TEXTS, documents


def zipped(*names: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, "held text " * 9)
    return held.getvalue()


def tarred() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        entry = tarfile.TarInfo("inside.txt")
        entry.size = 90
        archive.addfile(entry, io.BytesIO(b"held text " * 9))
    return held.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.html", b"<!DOCTYPE html><html><p>x</p>", "HTML: pandoc"),
        ("a.txt", b"\n<html lang=en><p>x</p>", "HTML"),
        ("a.htm", b"<div>x</div>", "HTML"),
        ("a.xml", b"<?xml version='1.0'?><a>x</a>", "XML: xmllint"),
        ("a", b"<?xml version='1.0'?><!DOCTYPE html><html>", "HTML"),
        ("a.tar", tarred(), "a tar archive"),
        ("a.tar.gz", gzip.compress(tarred()), "a tar archive"),
        ("a.tgz", gzip.compress(tarred()), "a tar archive"),
        ("a.zip", zipped("a.txt"), "a zip archive"),
        ("a.docx", zipped("[Content_Types].xml", "word/document.xml"), r"office document \(Word\)"),
        ("a.xlsx", zipped("[Content_Types].xml", "xl/workbook.xml"), r"office document \(Excel\)"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "office document of the old kind"),
        ("a.pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document: pdftotext"),
        ("a", b"\x7fELF\x02\x01" + bytes(99), r"a program \(ELF\)"),
        ("a.exe", b"MZ\x90\0" + bytes(99), r"a program \(Windows\)"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(99), r"a picture \(PNG\)"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(99), r"a picture \(JPEG\)"),
        ("a.gif", b"GIF89a" + bytes(99), r"a picture \(GIF\)"),
        ("a.txt", bytes(range(256)) * 9, "binary data"),
        ("a.txt", bytes(999), "binary data"),
        ("a.txt", b"abc\0def\n" * 300, "binary data"),  # not UTF-16: ASCII in UTF-16 has a zero in every second byte
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive"),
        ("a.json", b'{\n "data": [\n  {"text": "x"}\n ]\n}\n', "JSON objects of many lines"),
        ("a.json", b'{\n "text": "x"\n}\n{\n "text": "y"\n}\n', "JSON objects of many lines"),
        ("a.json", b'["x", "y"]', "a JSON array of other things than objects"),
        ("a.txt.gz", gzip.compress(b"<html><body>"), "HTML: gzip -dc <"),
        ("a", b"<div class='x'>some words</div>\n<p>and more</p>\n" * 9, "HTML: pandoc"),
        ("a", b"<page xmlns='http://example.org/'>some words</page>", "XML: xmllint"),
        ("a.txt.gz.gz", gzip.compress(gzip.compress(b"some words\n" * 9)), "packed twice .gzip within gzip.: gzip -dc"),
        ("a.parquet.gz", gzip.compress(b"PAR1" + bytes(99)), "Parquet, packed with gzip: gzip -dc <"),
        ("a.pdf", b"\n%PDF-1.7\n%words\n", "a PDF document: pdftotext"),
        ("a", bytes(range(256)) * 9 + b"\x1b$B", "binary data"),
        ("a.txt.lzma", lzma.compress(b"some words\n" * 99, lzma.FORMAT_ALONE), "packed with lzma: xz -dc"),
        ("a.warc.gz", gzip.compress(b"WARC/1.0\r\nWARC-Type: warcinfo\r\n\r\n"), r"a web archive \(WARC\)"),
        ("a.a", b"!<arch>\nsome.txt/ 0\n", "an ar archive"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS.*git lfs pull"),
        ("a.txt", "吾輩は猫\n".encode("iso2022-jp") * 9, "ISO-2022-JP text: iconv -f ISO-2022-JP"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # archives hold the time
)
def test_file_that_is_not_text_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, what: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert room.main([str(tmp_path / name), "--output-dir", str(tmp_path / "out")]) == 2
    [*_, line] = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: \S+/{re.escape(name)} seems to be .*{what}", line)
    assert not (tmp_path / "out" / "meta.json").exists()


GERMAN = "Der Käse ist größer.\n" * 40
MIXED = "Der Käse ist größer als 漢字。\n" * 40


@pytest.mark.parametrize("name", ["a.txt", "it's a $name.txt", "-a.txt", "caf\udce9.txt", "a.txt.gz", "a.txt.xz"])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((MIXED, encoding) for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")),
        ("这是一个测试。\n" * 40, "utf-16-le"),
        ("Привет, мир и все.\n" * 40, "utf-16-be"),
        (GERMAN, "latin-1"),
        (GERMAN + "“ja” – 5 €\n", "cp1252"),
        (GERMAN, "cp037"),
    ],
)
def test_iconv_line_makes_the_text_readable_as_printed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    encoding: str,
) -> None:
    if not shutil.which("iconv") or (name.endswith("xz") and not shutil.which("xz")):
        pytest.skip("needs iconv, and xz")
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(PACK[Path(name).suffix if "txt." in name else ""](text.encode(encoding)))
    arguments = ["--tokenizer", "byte", "--output-dir", "out"]
    assert room.main([f"./{name}", *arguments]) == 2
    [*_, line] = capsys.readouterr().err.splitlines()
    [command] = re.findall(r": ([^:]*iconv -f \S+ -t utf-8.*)$", line)
    before = set(Path().iterdir())
    subprocess.run(["bash", "-c", command], check=True)
    [new] = set(Path().iterdir()) - before
    assert new.read_bytes().decode() == text
    assert room.main([f"./{new}", *arguments]) == 0


def test_command_never_writes_over_a_file(tmp_path: Path) -> None:
    for name in ("a.txt", "a.new.txt"):
        (tmp_path / name).write_text("<html>")
    with pytest.raises(NoText, match=r"> \S+/a\.new\.new\.txt$"):
        find([str(tmp_path / "a.txt")])


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize("data", [json.dumps({"v": 1, "rows": RECORDS}, indent=1), json.dumps(TEXTS)])
def test_jq_line_makes_json_lines_as_printed(tmp_path: Path, data: str) -> None:
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(NoText) as caught:
        find([str(tmp_path / "a.json")])
    command = str(caught.value).partition(": jq")
    subprocess.run(["sh", "-c", "jq" + command[2]], check=True)
    assert documents(tmp_path / "a.jsonl") == TEXTS


def test_archive_line_makes_a_folder_that_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tarred()))
    with pytest.raises(NoText) as caught:
        find([str(tmp_path / "a.tar.gz")])
    subprocess.run(["sh", "-c", "mkdir" + str(caught.value).partition("mkdir")[2]], check=True)
    assert documents(tmp_path / "a.files") == ["held text " * 9]


def test_names_can_be_printed_and_quoted() -> None:
    assert printable("caf\udce9\n.txt") == "caf\\xe9\\n.txt"
    assert quoted("a b") == "'a b'"
    assert quoted("-a") == "./-a"
    command = "printf %s " + quoted("c\udce9\n")
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout == b"c\xe9\n"
