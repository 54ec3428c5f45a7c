"""records.py: one text of each record. Records without text are counted by reason; broken ones stop or are counted."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prepare import prepare as room
from prepare import records
from prepare.data import read_meta
from prepare.records import Tally, csv_rows, json_array, json_lines
from prepare.tokens import DataError

READERS = {
    "jsonl": json_lines,
    "json": json_array,
    "csv": lambda file, tally: csv_rows(file, tally, ","),
    "tsv": lambda file, tally: csv_rows(file, tally, "\t"),
}


def texts(kind: str, data: bytes, *, wanted: str = "text", lenient: bool = False) -> tuple[list[str], Tally]:
    tally = Tally("a", wanted, lenient)
    found = [text.decode() for _, text in READERS[kind](io.BytesIO(data), tally)]
    tally.finish()
    return found, tally


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_records_without_text_are_counted_by_reason_with_the_first(kind: str) -> None:
    rows = [{"text": "one"}, {"other": 1}, {"text": None}, {"text": 5}, {"text": ["x"]}, {"text": ""}, {"text": "two"}]
    data = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    found, tally = texts(kind, data.encode())
    assert found == ["one", "two"]
    assert tally.without == {"missing": 1, "null": 1, "not a string": 2, "empty": 1}
    assert (tally.first, tally.broken) == (2, 0)


DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
HUGE = b'{"id": ' + b"9" * 5000 + b', "text": "has a huge id"}'


def test_deep_nesting_is_a_broken_line() -> None:
    found, tally = texts("jsonl", b'{"text": "fine"}\n' + DEEP + b"\n", lenient=True)
    assert (found, tally.broken, tally.first_broken) == (["fine"], 1, 2)
    with pytest.raises(DataError, match=r"line 1 of a is not a JSON object \(it is nested too deeply\)"):
        texts("jsonl", DEEP)
    with pytest.raises(DataError, match=r"element 1 of a cannot be read \(it is nested too deeply\)"):
        texts("json", b"[" + DEEP + b"]")


def test_huge_number_beside_the_text_does_no_harm() -> None:
    assert texts("jsonl", HUGE)[0] == ["has a huge id"]
    assert texts("json", b"[" + HUGE + b"]")[0] == ["has a huge id"]


@pytest.mark.parametrize("errors", ["strict", "replace", "skip"])
def test_half_a_character_in_json_is_bad_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], errors: str) -> None:
    lines = ['{"text": "good text, and some more"}'] * 20 + [
        r'{"text": "bad \ud800 here"}',
        r'{"text": "nul \u0000 here"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    code = room.main([str(tmp_path / "a.jsonl"), "--errors", errors, "--output-dir", str(tmp_path / "out")])
    assert code == (2 if errors == "strict" else 0)
    if errors == "strict":
        assert r"line 21 has 0xed, half a character such as \ud800" in capsys.readouterr().err
    else:
        assert read_meta(tmp_path / "out").inputs[0].repaired == 3


@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["text", "b"]), st.text(max_size=9) | st.lists(st.integers())), max_size=9
    ),
    indent=st.sampled_from([None, 1]),
    block=st.integers(1, 40),
)
def test_array_is_read_alike_wherever_it_is_cut(rows: list[dict[str, object]], indent: int | None, block: int) -> None:
    data = json.dumps(rows, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    before = records.BLOCK
    records.BLOCK = block
    try:
        tally = Tally("a", "text")
        found = [text for _, text in json_array(io.BytesIO(data), tally)]
    finally:
        records.BLOCK = before
    assert found == [records.utf8(str(row["text"])) for row in rows if isinstance(row.get("text"), str) and row["text"]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"text": "x"}, {"text": "y', "element 2 of a is not JSON .*the file ends before the array does"),
        (b'[{"text": "x"}', "a ends before its array does, after 1 elements"),
        (b'[{"text": "x"},', "a ends before its array does, after 1 elements"),
        (b'[{"text": "x"} {"text": "y"}]', "no comma after element 1"),
        (b'[{"text": "x"}]\n[{"text": "y"}]', "goes on after the end of its array"),
        (b'[{"text": "x"}, 5]', "element 2 of a is not a JSON object"),
        (b'[{"text": x}' + b" " * 999 + b"]", r"element 1 of a is not JSON \(Expecting value\): mend it"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_broken_array_is_an_error(data: bytes, message: str, lenient: bool) -> None:
    with pytest.raises(DataError, match=message):
        texts("json", data, lenient=lenient)


def test_array_is_not_held_whole() -> None:
    class Endless(io.RawIOBase):
        """More than any memory."""

        left = 200_000

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:
            row = b'{"text": "' + b"x" * 4000 + b'"},'
            if self.left == 200_000:
                row = b"[" + row
            self.left -= 1
            buffer[: len(row)] = row
            return len(row)

    def held() -> Iterator[int]:
        for number, (at, text) in enumerate(json_array(io.BufferedReader(Endless()), Tally("a", "text")), 1):  # type: ignore[arg-type]
            assert (at, len(text)) == (number, 4000)
            yield number
            if number == 5000:
                return

    assert max(held()) == 5000


def test_quoted_cells_hold_separators_quotes_and_line_breaks() -> None:
    data = b'id,text\r\n1,"a, ""b""\r\nc"\r\n2,plain\r\n3,\r\n4\r\n\r\n'
    found, tally = texts("csv", data)
    assert found == ['a, "b"\r\nc', "plain"]
    assert tally.without == {"empty": 1, "missing": 1}
    assert tally.first == 5


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_column_is_chosen_by_its_name(kind: str) -> None:
    sign = "," if kind == "csv" else "\t"
    data = f"id{sign}body\n1{sign}first\n2{sign}second\n".encode()
    assert texts(kind, data, wanted="body")[0] == ["first", "second"]
    with pytest.raises(DataError, match=r"a has no column 'text', it has id, body: choose with --text-field"):
        texts(kind, data)


def test_of_two_columns_of_one_name_none_is_guessed(tmp_path: Path) -> None:
    message = "a has 2 columns 'text': rename the one that is not meant"
    with pytest.raises(DataError, match=message):
        texts("csv", b"text,text\n1,a\n")
    assert texts("csv", b"text,n,n\na,1,2\n")[0] == ["a"]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], names=["text", "text"]), tmp_path / "a")
    with (tmp_path / "a").open("rb") as file, pytest.raises(DataError, match=message):
        list(records.parquet(file, Tally("a", "text")))


def test_row_with_too_many_cells_is_not_cut_short() -> None:
    data = b"id,text\n1,a text, with a comma\n2,fine\n"
    with pytest.raises(DataError, match=r"line 2 of a is not a CSV row \(it has 3 cells, the header 2\): quote"):
        texts("csv", data)
    found, tally = texts("csv", data, lenient=True)
    assert (found, tally.broken, tally.first_broken) == (["fine"], 1, 2)


@pytest.mark.parametrize("lenient", [False, True])
def test_quote_without_an_end_is_an_error(lenient: bool) -> None:
    with pytest.raises(DataError, match="the quoted field that begins in line 3 of a has no end"):
        texts("csv", b'id,text\n1,fine\n2,"open\n' + b"3,more\n" * 99, lenient=lenient)


def test_parquet_reads_a_field_within_a_struct_and_counts_nulls(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"a": {"b": "deep"}}, {"a": {"b": None}}, {"a": None}, {"a": {"b": "er"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    tally = Tally("x", "a.b")
    with (tmp_path / "x.parquet").open("rb") as file:
        assert list(records.parquet(file, tally)) == [(1, b"deep"), (4, b"er")]
    assert sum(tally.without.values()) == 2
    assert tally.first == 2
    for wanted, message in (
        ("a.c", "has no column 'a.c'"),
        ("c", "it has a: choose"),
        ("a", "has struct<.*>, not text"),
    ):
        with (tmp_path / "x.parquet").open("rb") as file, pytest.raises(DataError, match=message):
            list(records.parquet(file, Tally("x", wanted)))
