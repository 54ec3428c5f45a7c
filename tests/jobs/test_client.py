"""client.py: each error of a broken kubeconfig or server is one line."""

from pathlib import Path

import pytest
import yaml

from elastic_gpt.jobs import commands

Output = pytest.CaptureFixture[str]


def kubeconfig(folder: Path, server: object = "https://127.0.0.1:9", user: object = None) -> Path:
    path = folder / "config"
    tree = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "clusters": [{"name": "here", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": user or {}}],
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def listing(path: Path) -> int:
    return commands.main(["list", "--kubeconfig", str(path)])


@pytest.mark.parametrize(
    "server",
    [
        "not a url",
        "",
        "127.0.0.1:9",
        "ftp://127.0.0.1",
        "http://x:y:z",
        "http://[::1",
        "https://h:99999",
        "https://a b",
    ],
)
def test_a_server_that_is_not_a_web_address_is_named_with_its_file(server: str, tmp_path: Path, capfd: Output) -> None:
    path = kubeconfig(tmp_path, server)
    assert listing(path) == 2
    told = f"error: the server in {path} is '{server}', which is not a web address: write https://HOST:PORT there"
    assert capfd.readouterr().err.startswith(told)


@pytest.mark.parametrize("server", [3, [1], {"a": 1}, None])
def test_a_server_that_is_not_text_is_one_line_with_the_file(server: object, tmp_path: Path, capfd: Output) -> None:
    path = kubeconfig(tmp_path, server)
    assert listing(path) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {path} is no kubeconfig (")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [bytes(range(256)), b"\xff\xfea\0", b"\0", b"[" * 20_000, b"[[[", b"3", b"clusters: 3\ncontexts: [x]\n", b""],
    ids=["binary", "utf-16", "nul", "deep", "open", "number", "types", "empty"],
)
def test_a_broken_kubeconfig_is_one_line_with_its_name(content: bytes, tmp_path: Path, capfd: Output) -> None:
    path = tmp_path / "config"
    path.write_bytes(content)
    assert listing(path) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {path} is no kubeconfig (")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "user",
    [
        {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "nosuch-auth-plugin"}},
        {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "false"}},
        {"exec": 3},
    ],
)
def test_a_command_for_logging_in_that_fails_is_told_before_the_server_is_asked(
    user: object, tmp_path: Path, capfd: Output
) -> None:
    path = kubeconfig(tmp_path, user=user)
    assert listing(path) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: the command in {path} that logs in failed (")
    assert said.count("\n") == 1
