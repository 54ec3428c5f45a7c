"""data.py: a prepared folder opens as meta.json says, or is refused in one line."""

import os
from pathlib import Path

import numpy as np
import pytest

from prepare.data import load_tokenizer, open_split, read_meta
from prepare.tokens import DataError
from prepare.verify import verify
from tests.prepare.test_tokens import OLD, prepared


def test_opened_ids_cannot_be_written(tmp_path: Path) -> None:
    prepared(tmp_path, OLD)
    ids = open_split(tmp_path, "val")
    assert isinstance(ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


@pytest.mark.parametrize("change", [-2, -1, 2])
def test_file_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    prepared(tmp_path, OLD)
    os.truncate(tmp_path / "train.bin", 720 + change)
    with pytest.raises(DataError, match=rf"train\.bin has {720 + change} bytes, meta\.json says 720"):
        open_split(tmp_path, "train")
    (tmp_path / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin is missing"):
        open_split(tmp_path, "train")
    with pytest.raises(DataError, match=r"no split 'test', it has train, val"):
        open_split(tmp_path, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "prepare the data first"),
        ("{half", "is not JSON"),
        ("[]", "format_version None"),
        (
            '{"format_version": 99}',
            "format_version 99, this elastic-gpt .* reads 1 and older: install a newer elastic-gpt",
        ),
        (
            '{"format_version": 2, "tools": {"elastic-gpt": "0.9.1"}}',
            r"format_version 2, this elastic-gpt .*: pip install 'elastic-gpt>=0\.9\.1'",
        ),
        ('{"format_version": 2, "tools": 5}', "install a newer elastic-gpt"),
        ('{"format_version": 0}', "prepare again"),
        ("[" * 100_000, "is not JSON"),
        ('{"format_version": 1, "dtype": "uint16"}', "is not as prepare writes it"),
    ],
)
def test_folder_without_a_readable_meta_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "meta.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_split(tmp_path, "train")


def test_folder_of_version_0_1_0_opens() -> None:
    folder = Path(__file__).parent / "made_by_0_1_0"
    text = "To be, or not to be: that is the question.\n" * 8
    assert load_tokenizer(folder).decode(open_split(folder, "train")) == text[: int(0.9 * len(text))]
    assert [finding.text for finding in verify(folder) if finding.good is False] == []
    assert "elastic-gpt" not in read_meta(folder).tools
