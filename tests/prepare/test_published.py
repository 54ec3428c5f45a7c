"""Data that are prepared onto an object store: whole or not there, and waited for."""

import threading
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from prepare import published
from prepare.prepare import main
from prepare.tokens import META, UNFINISHED, DataError
from tests.conftest import until
from tests.elastic.test_checkpoint import Killed

TEXT = "It was the best of times, it was the worst of times.\n" * 40


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(published, "LOOK_SECONDS", 0.01)
    (tmp_path / "text.txt").write_text(TEXT)
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://bucket/{uuid.uuid4().hex}"
    return f"memory://{uuid.uuid4().hex}"


def prepare(tmp_path: Path, place: object, *more: str) -> int:
    return main([str(tmp_path / "text.txt"), "--tokenizer=char", f"--output_dir={place}", *more])


def there(url: str) -> dict[str, bytes]:
    store, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    store.invalidate_cache()
    return {name.removeprefix(f"{root}/"): store.cat_file(name) for name in store.find(root)}


def test_the_files_are_those_that_a_folder_gets(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(tmp_path, url, "--verify") == 0
    assert f"{url}/train.bin" in capsys.readouterr().out
    folder = tmp_path / "folder"
    assert prepare(tmp_path, folder) == 0
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert there(url) == files
    assert not list((tmp_path / "cache" / "elastic-gpt" / "prepared").iterdir())  # a machine that trains needs the room


def test_data_that_take_the_place_of_others_are_never_mixed_with_them(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, url)
    before = there(url)
    store = fsspec.core.url_to_fs(url)[0]  # the one that prepare gets
    put, calls = store.put_file, []

    def killed(source: str, target: str, **more: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise Killed
        put(source, target, **more)

    (tmp_path / "text.txt").write_text(TEXT.upper())
    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", killed)
        with pytest.raises(Killed):
            prepare(tmp_path, url)
    assert there(url)["train.bin"] != before["train.bin"]
    assert there(url)[META] == UNFINISHED
    assert not published.is_there(url)
    assert prepare(tmp_path, url) == 0
    assert published.is_there(url)
    assert there(url)["val.bin"] != before["val.bin"]


def test_who_waits_goes_on_when_the_last_file_has_come(url: str, tmp_path: Path) -> None:
    codes: list[int] = []
    waiting = threading.Thread(target=lambda: codes.append(main(["--wait", f"--output_dir={url}"])), daemon=True)
    waiting.start()
    prepare(tmp_path, url)
    waiting.join()
    assert codes == [0]


def test_a_wait_in_vain_ends_with_124(url: str, tmp_path: Path) -> None:
    for place in (url, tmp_path / "nowhere"):
        assert main(["--wait=0", f"--output_dir={place}"]) == 124
    prepare(tmp_path, tmp_path / "folder")
    assert main(["--wait=0", f"--output_dir={tmp_path / 'folder'}"]) == 0
    (tmp_path / "folder" / META).write_bytes(UNFINISHED)
    assert main(["--wait=0", f"--output_dir={tmp_path / 'folder'}"]) == 124


def test_a_store_that_is_away_is_waited_for_and_one_that_refuses_is_not(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, root = fsspec.core.url_to_fs(url)
    monkeypatch.setattr(published, "store_of", lambda _: (store, root))  # each thread has one of its own, else
    said: list[str] = []
    errors: list[Exception] = [TimeoutError("no answer")]

    def away(*_: Any, **__: Any) -> bytes:
        raise errors[0]

    monkeypatch.setattr(store, "cat_file", away)
    waiting = threading.Thread(target=published.wait, args=(url, 1e9, said.append), daemon=True)
    waiting.start()
    until(lambda: said)
    assert said[0].startswith(f"{url} cannot be read (no answer)")
    errors[0] = FileNotFoundError()
    until(lambda: len(said) > 1)
    assert said[1:] == [f"waiting for data in {url}"]
    monkeypatch.setattr(store, "cat_file", lambda *_, **__: b"{}")
    waiting.join()
    errors[0] = PermissionError("Access Denied")
    monkeypatch.setattr(store, "cat_file", away)
    with pytest.raises(DataError, match="Access Denied"):
        published.wait(url, 1e9, said.append)


def test_a_store_that_refuses_us_says_so_before_the_work(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.core.url_to_fs(url)[0], "cat_file", refuse)
    assert prepare(tmp_path, url) == 2
    assert capsys.readouterr().err.startswith(f"error: {url} cannot be read (Access Denied): check the address")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("words", [["--output_dir=x", "a.txt"], ["--sample", "--output_dir=x"], []])
def test_a_wait_reads_nothing_and_needs_a_place(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*words, "--wait"])
    assert "--wait goes with --output_dir alone" in capsys.readouterr().err
