"""Checkpoints on an object store: the same law as on a disk, over memory:// and the real S3 protocol (moto)."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from elastic_gpt.checkpoint import CheckpointError, Checkpoints
from elastic_gpt.storage import LocalStorage, RemoteStorage, Unreachable
from tests.conftest import TINY, elastic_gpt, environment, metrics, until
from tests.elastic.test_checkpoint import Killed, state


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://bucket/{uuid.uuid4().hex}"
    return f"memory://{uuid.uuid4().hex}"


def write(url: str, *steps: int, keep: int = 5) -> Checkpoints:
    checkpoints = Checkpoints(url, keep)
    for step in steps:
        checkpoints.save(step, state(step), [{"step": step}])
        assert checkpoints.finished(wait=True) == step
    return checkpoints


def files(url: str) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(url, use_listings_cache=False)


def test_what_is_loaded_is_what_was_saved_and_old_ones_are_dropped(url: str) -> None:
    write(url, 10, 20, 30, keep=2)
    again = Checkpoints(url)
    assert again.steps() == [20, 30]
    system, root = files(url)
    assert sorted({name.split("/")[-2] for name in system.find(root)}) == ["step_00000020", "step_00000030"]
    live = state(0)
    assert again.load(30, live) == [{"step": 30}]
    assert all(torch.equal(live[name], tensor) for name, tensor in state(30).items())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", range(1, 7))
def test_a_kill_at_any_upload_or_deletion_leaves_a_whole_checkpoint(
    url: str, monkeypatch: pytest.MonkeyPatch, call: int, when: str
) -> None:
    checkpoints = write(url, 10, keep=1)
    calls = []
    store = checkpoints.storage.files  # type: ignore[attr-defined]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def killed(*args: Any, **more: Any) -> Any:
            calls.append(args)
            here = len(calls) == call
            if here and when == "before":
                raise Killed
            try:
                return real(*args, **more)
            finally:
                if here:
                    raise Killed

        return killed

    for name in ("put_file", "pipe_file", "rm_file", "rm"):
        monkeypatch.setattr(store, name, deadly(getattr(store, name)))
    checkpoints.save(20, state(20), [{"step": 20}])
    assert checkpoints.pending
    died = isinstance(checkpoints.pending.exception(), Killed)
    assert died == (len(calls) >= call)
    monkeypatch.undo()

    again = Checkpoints(url)
    newest = again.newest_step()
    assert newest in (10, 20)
    live = state(0)
    again.load(newest, live)
    assert all(torch.equal(live[tensor], value) for tensor, value in state(newest).items())
    again.save(30, state(30), [{"step": 30}])
    assert again.finished(wait=True) == 30
    assert Checkpoints(url).newest_step() == 30


@pytest.mark.parametrize("damage", ["flip", "missing", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    url: str, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    write(url, 10, 20)
    system, root = files(url)
    tensors, manifest = f"{root}/step_00000020/model.safetensors", f"{root}/step_00000020/MANIFEST.json"
    if damage == "flip":
        content = bytearray(system.cat_file(tensors))
        content[-1] ^= 1
        system.pipe_file(tensors, bytes(content))
    elif damage == "manifest":
        system.pipe_file(manifest, b"{}")
    else:
        system.rm_file(tensors if damage == "missing" else manifest)
    assert Checkpoints(url).newest_step() == 10
    assert ("step_00000020 is damaged" in capsys.readouterr().err) == (damage != "no manifest")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_silently(url: str) -> None:
    write(url, 10)
    system, root = files(url)
    system.pipe_file(f"{root}/step_00000010/optimizer.safetensors", b"abc")
    with pytest.raises(CheckpointError, match="restore one from a backup"):
        Checkpoints(url).newest_step()


def test_a_storage_that_does_not_answer_is_neither_empty_nor_damaged(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = write(url, 10, 20)

    def down(*_: object, **__: object) -> None:
        raise RuntimeError("the network is down")  # as botocore's, no OSError

    store = checkpoints.storage.files  # type: ignore[attr-defined]
    for name in ("ls", "get_file", "cat_file"):
        with monkeypatch.context() as patch:
            patch.setattr(store, name, down)
            with pytest.raises(OSError, match="the network is down"):
                checkpoints.newest_step()
    assert checkpoints.newest_step() == 20


@pytest.fixture
def visible() -> Iterator[Path]:
    """A folder that other users may enter, as pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


def test_a_folder_that_may_not_be_looked_into_is_not_empty(visible: Path) -> None:
    folder = visible / "checkpoints"
    (folder / "step_00000010").mkdir(parents=True)
    (folder / "step_00000010" / "MANIFEST.json").touch()
    (folder / "lost+found").mkdir(mode=0)  # not ours, and nothing that stops us
    folder.chmod(0o311)
    try:
        if os.getuid() == 0:  # whom nothing is forbidden
            os.seteuid(65534)
        with pytest.raises(Unreachable, match=r"checkpoints.*: Permission denied"):
            LocalStorage(folder).manifests()
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
    folder.chmod(0o755)
    assert LocalStorage(folder).manifests() == ["step_00000010"]
    assert LocalStorage(visible / "nowhere").manifests() == []
    (visible / "file").touch()
    assert LocalStorage(visible / "file").manifests() == []


@pytest.mark.usefixtures("s3_server")
def test_a_server_that_is_down_fails_the_save_and_the_next_one_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"s3://bucket/{uuid.uuid4().hex}"
    checkpoints = write(url, 10)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # nobody listens there
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr("s3fs.core.S3FileSystem.retries", 1)
        type(files(url)[0]).clear_instance_cache()
        up, checkpoints.storage = checkpoints.storage, RemoteStorage(url)
        checkpoints.save(20, state(20), [])
        assert isinstance(checkpoints.finished(wait=True), OSError)
        with pytest.raises(OSError, match="cannot list"):
            checkpoints.newest_step()
    type(files(url)[0]).clear_instance_cache()
    checkpoints.storage = up
    checkpoints.save(30, state(30), [])
    assert checkpoints.finished(wait=True) == 30
    assert checkpoints.steps() == [10, 30]


def test_a_missing_package_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ocifs", None)
    with pytest.raises(CheckpointError, match="pip install ocifs"):
        Checkpoints("oci://bucket/run")
    with pytest.raises(CheckpointError, match="nonsense"):
        Checkpoints("nonsense://bucket/run")


@pytest.mark.slow
@pytest.mark.usefixtures("s3_server")
def test_a_killed_run_resumes_from_s3_and_text_is_generated_from_it(data: Path, tmp_path: Path) -> None:
    run, url = tmp_path / "run", f"s3://bucket/{uuid.uuid4().hex}"
    words = ["train", "debug_cpu", *TINY, "--data.dir", data, "--run-dir", run, "--checkpoint.dir", url]
    words = [*map(str, words), "--checkpoint.interval=5", "--evaluate.interval=0", "--evaluate.sequences=8"]
    worker = subprocess.Popen(
        [sys.executable, "-m", "elastic_gpt.cli", *words, "--steps=100000"],
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: Checkpoints(url).steps() or worker.poll() is not None)
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    stored = Checkpoints(url).newest_step()
    assert stored
    for snapshot in snapshots_of(run):
        shutil.rmtree(snapshot)
    done = elastic_gpt(*words, f"--steps={stored + 3}")
    assert f"step_{stored:08d}" in done.stdout
    assert metrics(run)[-1]["step"] == stored + 3
    assert Checkpoints(url).newest_step() == stored + 3
    assert not (run / "checkpoints").exists()
    assert elastic_gpt("generate", run, "--prompt", "The ", "--max-new-tokens", "5").stdout


def snapshots_of(run: Path) -> list[Path]:
    from elastic_gpt.contract import shared_memory
    from elastic_gpt.ledger import Ledger

    folder = shared_memory() / Ledger(run).run_id()
    return [folder] if folder.exists() else []
