"""Where checkpoints are kept: a local folder, or a place that fsspec can reach (s3://bucket/run).

Files have names relative to the place. In both kinds a file appears whole or not at all: in a
folder by a rename, in an object store because the PUT of an object is atomic. Every failure is an
OSError, so that training can go on and save again later.
"""

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec

from elastic_gpt.contract import MANIFEST

SCHEME = re.compile(r"[a-z][a-z0-9+.:-]+")
FOLDER = re.compile(r"step_\d+")  # our folders; others may be beside them (lost+found, a user's copy)
PARTIAL = ".partial"  # how the name of a file ends that is being written


class Unreachable(OSError):
    """The storage does not answer, so it is not known what it has. That is neither damage nor absence."""


class Storage(Protocol):
    """Files in one place, by relative names such as `step_00000010/MANIFEST.json`."""

    def manifests(self) -> list[str]:
        """Names of our folders that have a MANIFEST.json. Raises Unreachable if they cannot be listed."""

    def read_text(self, name: str) -> str: ...

    def write_text(self, name: str, text: str) -> None:
        """Write a file, whole or not at all. It is on storage when this returns."""

    def write_file(self, name: str, write: Callable[[Path], Any], check: Callable[[Path], Any]) -> Any:
        """Let `write` make a local file and store it as `name`. Returns the result of `check` on the local file."""

    def open_file(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A context with a local path that has the content of `name`."""

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of the files in a folder by their names; none if there is no such folder."""

    def versions(self, name: str) -> dict[str, str]:
        """What tells a file of a folder from what was there before, without reading it, by the files' names."""

    def sweep(self, name: str) -> None:
        """Delete what killed writers have left in a folder."""

    def delete(self, name: str) -> None: ...

    def delete_folder(self, name: str) -> None:
        """Delete a folder that has no manifest. What cannot be deleted now stays."""


class LocalStorage:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def manifests(self) -> list[str]:
        # Not glob and exists: they treat an error as an absence, and the run would start from zero.
        return [name for name in self._list(".") if FOLDER.fullmatch(name) and MANIFEST in self._list(name)]

    def _list(self, name: str) -> list[str]:
        try:
            return os.listdir(self.folder / name)  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise Unreachable(f"cannot list {self.folder / name}: {error.strerror}") from error

    def read_text(self, name: str) -> str:
        return (self.folder / name).read_text()

    def write_text(self, name: str, text: str) -> None:
        self.write_file(name, lambda aside: aside.write_text(text), lambda _: None)
        _flush((self.folder / name).parent)
        _flush(self.folder)

    def write_file(self, name: str, write: Callable[[Path], Any], check: Callable[[Path], Any]) -> Any:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, since several nodes that leave together may save the same state.
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            write(aside)
            _flush(aside)
            checked = check(aside)
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)
        return checked

    @contextlib.contextmanager
    def open_file(self, name: str) -> Iterator[Path]:
        yield self.folder / name

    def sizes(self, name: str) -> dict[str, int]:
        found = {}
        for file in self._list(name):
            with contextlib.suppress(FileNotFoundError):
                found[file] = (self.folder / name / file).stat().st_size
        return found

    def versions(self, name: str) -> dict[str, str]:
        found = {}
        for file in self._list(name):
            with contextlib.suppress(FileNotFoundError):
                facts = (self.folder / name / file).stat()
                found[file] = f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns}"
        return found

    def sweep(self, name: str) -> None:
        for partial in (self.folder / name).glob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        (self.folder / name).unlink()

    def delete_folder(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)


class RemoteStorage:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.files, self.root = open_url(self.url, "checkpoint.dir")

    def __str__(self) -> str:
        return self.url

    def manifests(self) -> list[str]:
        with as_os_error(f"list {self.url}"):
            # Not glob and exists, as above.
            names = [name.rstrip("/").rsplit("/", 1)[-1] for name in self._list(self.root)]
            folders = [name for name in names if FOLDER.fullmatch(name)]
            return [f for f in folders if any(n.endswith("/MANIFEST.json") for n in self._list(f"{self.root}/{f}"))]

    def _list(self, folder: str) -> list[str]:
        try:
            return self.files.ls(folder, detail=False)
        except FileNotFoundError:
            return []

    def read_text(self, name: str) -> str:
        with as_os_error(f"read {self.url}/{name}"):
            return self.files.cat_file(f"{self.root}/{name}").decode()

    def write_text(self, name: str, text: str) -> None:
        with as_os_error(f"write {self.url}/{name}"):
            self.files.pipe_file(f"{self.root}/{name}", text.encode())

    def write_file(self, name: str, write: Callable[[Path], Any], check: Callable[[Path], Any]) -> Any:
        with tempfile.TemporaryDirectory(prefix="elastic-gpt-") as folder:
            path = Path(folder) / "file"
            write(path)
            checked = check(path)
            with as_os_error(f"write {self.url}/{name}"):
                self.files.put_file(str(path), f"{self.root}/{name}")
            return checked

    @contextlib.contextmanager
    def open_file(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="elastic-gpt-") as folder:
            path = Path(folder) / "file"
            with as_os_error(f"read {self.url}/{name}"):
                self.files.get_file(f"{self.root}/{name}", str(path))
            yield path

    def sizes(self, name: str) -> dict[str, int]:
        return {file: facts["size"] for file, facts in self._facts(name).items()}

    def versions(self, name: str) -> dict[str, str]:
        return {file: repr(sorted(facts.items())) for file, facts in self._facts(name).items()}

    def _facts(self, name: str) -> dict[str, dict[str, Any]]:
        """What the store says of the files of a folder, by their names."""
        with as_os_error(f"list {self.url}/{name}"):
            try:
                found = self.files.ls(f"{self.root}/{name}", detail=True)
            except FileNotFoundError:
                return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry for entry in found}

    def sweep(self, name: str) -> None:
        """An object is whole or absent, so nothing is left."""

    def delete(self, name: str) -> None:
        with as_os_error(f"delete {self.url}/{name}"):
            self.files.rm_file(f"{self.root}/{name}")

    def delete_folder(self, name: str) -> None:
        with contextlib.suppress(OSError), as_os_error(f"delete {self.url}/{name}"):
            self.files.rm(f"{self.root}/{name}", recursive=True)


def url_of(place: Path | str) -> str | None:
    """`place` as a URL; None if it is a path of this machine. (A Path has only one slash after `s3:`.)"""
    scheme, slash, rest = str(place).partition(":/")
    if not slash or not SCHEME.fullmatch(scheme):
        return None
    return f"{scheme}:///{rest.lstrip('/')}" if scheme == "file" else f"{scheme}://{rest.lstrip('/')}"


def open_url(url: str, setting: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and the path in it.

    Args:
        setting: the setting that named the URL, for the message.

    Raises:
        ValueError: if no installed package knows the URL's protocol.
    """
    try:
        # Without fsspec's cache of listings, since other processes write too.
        files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return files, str(root).rstrip("/")
    except ImportError as error:
        protocol = url.partition("://")[0]
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "oci": "ocifs", "abfs": "adlfs"}.get(protocol)
        cure = f"pip install {package}" if package else str(error)
        raise ValueError(f"{setting} {url}: no package for {protocol}:// is installed: {cure}") from error
    except ValueError as error:
        raise ValueError(f"{setting} {url}: {error}") from error


def open_storage(place: Path | str) -> Storage:
    """The storage at a folder or an fsspec URL.

    Raises:
        ValueError: if no installed package knows the URL's protocol.
    """
    return RemoteStorage(place) if "://" in str(place) and isinstance(place, str) else LocalStorage(Path(place))


@contextlib.contextmanager
def as_os_error(what: str) -> Iterator[None]:
    """Turns the errors that the libraries below fsspec have for a failed network into OSError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise Unreachable(f"cannot {what}: {type(error).__name__}: {error}") from error


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
