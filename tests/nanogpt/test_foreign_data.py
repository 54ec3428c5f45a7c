"""Training on what another tool prepared."""

from pathlib import Path

import pytest

from tests.conftest import TINY, elastic_gpt, metrics
from tests.prepare.test_interop import TEXT, characters_as_dlrover


def test_dlrovers_folder_can_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = characters_as_dlrover(tmp_path / "theirs", TEXT * 20)
    (tmp_path / "text.txt").write_text(TEXT * 20)
    elastic_gpt("prepare", tmp_path / "text.txt", "--tokenizer", "char", "--output-dir", tmp_path / "ours")
    for folder, run in ((data, "a"), (tmp_path / "ours", "b")):
        elastic_gpt("train", "debug_cpu", *TINY, "--steps=5", f"--data.dir={folder}", f"--run-dir={tmp_path / run}")
    runs = [[(line["sequence_hash"], line["loss"]) for line in metrics(tmp_path / run)] for run in ("a", "b")]
    assert runs[0] == runs[1]
    # The same ids have the same fingerprint, so the run goes on with either folder.
    elastic_gpt(
        "train", "debug_cpu", *TINY, "--steps=7", f"--data.dir={tmp_path / 'ours'}", f"--run-dir={tmp_path / 'a'}"
    )
    assert elastic_gpt("generate", tmp_path / "a", "--prompt", "To be", "--max-new-tokens", "5").stdout.strip()
    assert sorted(path.name for path in data.iterdir()) == ["meta.pkl", "train.bin", "val.bin"]
