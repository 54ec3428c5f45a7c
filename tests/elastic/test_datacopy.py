"""datacopy.py: data from an object store is copied to a machine once, and checked against its meta.json."""

import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from elastic_gpt import datacopy
from elastic_gpt.datacopy import local_copy
from elastic_gpt.storage import Unreachable
from prepare.data import open_split
from prepare.prepare import main as prepare
from prepare.tokens import DataError
from tests.elastic.test_checkpoint import Killed

MOST = 10**9


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    assert prepare([str(folder / "text.txt"), "--tokenizer", "char", "--output_dir", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datacopy, "PIECE", 5000)
    monkeypatch.setattr(datacopy, "_held", [])
    yield
    done()


def done() -> None:
    """Let go of all copies, as if the processes that use them had ended."""
    while datacopy._held:
        datacopy._held.pop().close()


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, prepared: Path) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_server")
    return stored(prepared, "s3://bucket" if request.param == "s3" else "memory:/")


def stored(prepared: Path, where: str, more: bytes = b"") -> str:
    url = f"{where}/{uuid.uuid4().hex}"
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    for path in prepared.rglob("*"):
        if path.is_file():
            extra = more if path.name == "meta.json" else b""
            files.pipe_file(f"{root}/{path.relative_to(prepared).as_posix()}", path.read_bytes() + extra)
    return url


def asked(monkeypatch: pytest.MonkeyPatch, url: str, die_at: int = 0) -> list[str]:
    """Records what is read from the store, and kills the process after so many pieces."""
    store = fsspec.core.url_to_fs(url, use_listings_cache=False)[0]
    if "cat_file" not in vars(store):
        store = type(store)  # each thread has an object of its own
    real, names = store.cat_file, []

    def cat_file(*args: Any, **more: Any) -> bytes:
        path = next(arg for arg in args if isinstance(arg, str))
        names.append(f"{path.rsplit('/', 1)[-1]} {more.get('start', 0)}")
        if len(names) == die_at:
            raise Killed
        content: bytes = real(*args, **more)
        return content

    monkeypatch.setattr(store, "cat_file", cat_file)
    return names


def test_data_is_copied_once_and_every_file_is_the_same(
    url: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = local_copy(url, tmp_path, MOST)
    assert open_split(folder, "train").tobytes() == open_split(prepared, "train").tobytes()
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(prepared) for path in prepared.rglob("*") if path.is_file())
    assert f"copying {url} to {tmp_path}" in capsys.readouterr().err
    read = asked(monkeypatch, url)
    assert local_copy(url, tmp_path, MOST) == folder
    assert read == ["meta.json 0"]


def test_a_copy_that_was_killed_goes_on_where_it_was(
    url: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        first = asked(patch, url, die_at=5)
        with pytest.raises(Killed):
            local_copy(url, tmp_path, MOST)
    done()
    read = asked(monkeypatch, url)
    folder = local_copy(url, tmp_path, MOST)
    again = {name for name in first[1:-1] if name in read[1:]}
    assert again == set()
    assert (folder / "train.bin").read_bytes() == (prepared / "train.bin").read_bytes()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_data_that_is_not_what_its_meta_json_says_is_refused(
    url: str, prepared: Path, tmp_path: Path, damage: str
) -> None:
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    content = (prepared / "val.bin").read_bytes()
    if damage == "missing":
        files.rm_file(f"{root}/val.bin")
    else:
        files.pipe_file(f"{root}/val.bin", content[:-2] if damage == "cut" else content[:-1] + b"\7")
    with pytest.raises((DataError, OSError), match=r"val\.bin"):
        local_copy(url, tmp_path, MOST)
    done()
    files.pipe_file(f"{root}/val.bin", content)
    assert (local_copy(url, tmp_path, MOST) / "val.bin").read_bytes() == content


def test_a_url_without_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no meta\.json in memory://nothing: prepare the data first"):
        local_copy("memory://nothing", tmp_path, MOST)


def test_a_store_that_does_not_answer_is_worth_another_try(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object, **__: object) -> None:
        raise RuntimeError("SlowDown")

    monkeypatch.setattr(fsspec.core.url_to_fs(url, use_listings_cache=False)[0], "cat_file", down)
    with pytest.raises(Unreachable, match="SlowDown"):
        local_copy(url, tmp_path, MOST)


def test_no_file_outside_its_folder_is_written(prepared: Path, tmp_path: Path) -> None:
    url = stored(prepared, "memory:/")
    files, root = fsspec.core.url_to_fs(url)
    meta = json.loads((prepared / "meta.json").read_text())
    meta["splits"]["val"]["file"] = "../../val.bin"
    files.pipe_file(f"{root}/meta.json", json.dumps(meta).encode())
    with pytest.raises(DataError, match="not a file of that folder"):
        local_copy(url, tmp_path, MOST)


def test_workers_that_start_together_copy_once(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = stored(prepared, "memory:/")
    read = asked(monkeypatch, url)
    threads = [threading.Thread(target=local_copy, args=(url, tmp_path, MOST)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pieces = [name for name in read if name.startswith("train.bin")]
    assert len(pieces) == len(set(pieces)) > 1


@pytest.mark.parametrize("harm", ["cut", "gone", "tokenizer gone", "other meta.json"])
def test_a_damaged_copy_is_made_again(prepared: Path, tmp_path: Path, harm: str) -> None:
    url = stored(prepared, "memory:/")
    copy = local_copy(url, tmp_path, MOST)
    done()
    match harm:
        case "cut":
            with (copy / "train.bin").open("r+b") as file:
                file.truncate(100)
        case "gone":
            (copy / "val.bin").unlink()
        case "tokenizer gone":
            shutil.rmtree(copy / "tokenizer")
        case _:
            (copy / "meta.json").write_text("{}")
    assert local_copy(url, tmp_path, MOST) == copy
    for path in (path for path in prepared.rglob("*") if path.is_file()):
        assert (copy / path.relative_to(prepared)).read_bytes() == path.read_bytes()


def test_a_damaged_copy_that_somebody_uses_is_told(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = stored(prepared, "memory:/")
    copy = local_copy(url, tmp_path, MOST)  # and used from now on
    (copy / "val.bin").unlink()
    monkeypatch.setattr(datacopy, "TRIES", 3)
    with pytest.raises(
        DataError, match=r"is damaged and in use: end the runs that use it, or name another --data\.cache"
    ):
        local_copy(url, tmp_path, MOST)
    assert (copy / "train.bin").exists()  # somebody has it open


def test_a_file_in_the_place_of_a_copy_is_replaced(prepared: Path, tmp_path: Path) -> None:
    url = stored(prepared, "memory:/")
    copy = local_copy(url, tmp_path, MOST)
    done()
    shutil.rmtree(copy)
    copy.touch()
    assert (local_copy(url, tmp_path, MOST) / "val.bin").exists()


def test_a_cache_that_cannot_be_written_is_told(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(DataError, match=r"cache cannot be written \(File exists\): name another --data\.cache FOLDER"):
        local_copy(stored(prepared, "memory:/"), tmp_path / "cache", MOST)


def test_a_copy_that_another_process_deletes_meanwhile_hinders_nobody(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (stored(prepared, "memory:/", b" " * count) for count in (1, 2))
    copy = local_copy(first, tmp_path, MOST)
    done()
    stat, looked = Path.stat, [0]

    def vanishing(path: Path, **more: bool) -> os.stat_result:
        looked[0] += path.parent == copy
        if looked[0] == 2:
            shutil.rmtree(copy, ignore_errors=True)
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", vanishing)
    assert (local_copy(second, tmp_path, MOST) / "val.bin").exists()
    assert not copy.exists()


def test_copies_that_nobody_uses_make_room_and_used_ones_stay(prepared: Path, tmp_path: Path) -> None:
    first, second = (stored(prepared, "memory:/", b" " * count) for count in (1, 2))
    size = sum(path.stat().st_size for path in prepared.rglob("*.bin"))
    copy = local_copy(first, tmp_path, 2 * size)
    with pytest.raises(DataError, match=r"in use.*--data\.cache-gb"):
        local_copy(second, tmp_path, 2 * size - 1)
    done()
    other = local_copy(second, tmp_path, 2 * size - 1)
    assert (copy.exists(), other.exists()) == (False, True)
    with pytest.raises(DataError, match=r"more than --data\.cache-gb allows"):
        local_copy(first, tmp_path, size - 1)


def test_a_full_disk_is_told_before_it_is_full(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Callable[[Path], Any] = lambda _: type("Usage", (), {"free": 10})  # noqa: E731
    monkeypatch.setattr("elastic_gpt.datacopy.shutil.disk_usage", usage)
    with pytest.raises(DataError, match=r"no room .* another --data\.cache FOLDER"):
        local_copy(stored(prepared, "memory:/"), tmp_path, MOST)
