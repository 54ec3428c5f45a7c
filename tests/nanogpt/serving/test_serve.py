"""serve.py: the command, from loading a model to its end by a signal."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import httpx2 as httpx
import pytest
import torch

from elastic_gpt.nodes.standby import __file__ as standby_file
from model_zoo.nanogpt.export import main as export
from model_zoo.nanogpt.model import GPT, GPTConfig
from prepare.tokenizer import Bytes, Characters
from tests.conftest import PATIENCE, elastic_gpt, environment, errors, standby, until
from tests.nanogpt.test_generate import ALPHABET, reciter, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Characters(ALPHABET)
    model = reciter(tokenizer.encode(ALPHABET).tolist(), tokenizer.vocab_size)
    return write_run(tmp_path_factory.mktemp("serve") / "alphabet", tokenizer, model)


class Server:
    """`elastic-gpt serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.log = process, ""
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self) -> None:
        """Until it serves."""
        until(lambda: "serving " in self.log or self.process.poll() is not None)
        found = re.search(r"serving (\S+) at (http://\S+)", self.log)
        assert found, self.log
        self.name, self.url = found.groups()
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log += line

    def complete(self, **wanted: object) -> dict:
        answer = self.http.post("/v1/completions", json={"model": self.name, "temperature": 0} | wanted)
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextlib.contextmanager
def serve(*words: object, wait: bool = True, **more: str) -> Iterator[Server]:
    command = [sys.executable, "-I", "-S", standby_file, standby(os.getpid()), "serve", "--port=0", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(**more))
    try:
        server = Server(process)
        if wait:
            server.wait()
        yield server
    finally:
        process.kill()
        process.wait()


def test_a_run_is_served_by_its_folders_name_on_loopback(run: Path) -> None:
    with serve(run) as server:
        assert server.url.startswith("http://127.0.0.1:")
        answer = server.complete(prompt="ab", max_tokens=3)
        assert (answer["model"], answer["choices"][0]["text"]) == ("alphabet", "cde")
        assert "model of step 7" in server.log


def test_sigterm_lets_what_is_running_and_waiting_end_first(run: Path) -> None:
    with serve(run, "--slots=1") as server:
        found: list[int] = []

        def ask() -> None:
            found.append(len(server.complete(prompt="a", max_tokens=1500)["choices"][0]["text"]))

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()

        def sent() -> bool:
            return "elastic_gpt_queue_length 2.0" in httpx.get(f"{server.url}/metrics").text

        until(sent)
        server.process.send_signal(signal.SIGTERM)
        for thread in asking:
            thread.join()
        assert found == [1500] * 3
        assert server.process.wait(PATIENCE) == 128 + signal.SIGTERM
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_an_exported_folder_is_served(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(256, block_size=16, n_layer=1, n_head=1, n_embd=8))
    write_run(tmp_path / "bytes", Bytes(), model)
    assert export([str(tmp_path / "bytes"), str(tmp_path / "exported")]) == 0
    with serve(tmp_path / "bytes") as first, serve(tmp_path / "exported", "--name=mine") as second:
        same = {"prompt": "ab", "max_tokens": 8}
        assert second.complete(**same)["model"] == "mine"
        assert first.complete(**same)["choices"] == second.complete(**same)["choices"]


@pytest.mark.usefixtures("s3_server")
def test_vertex_ai_starts_it_by_its_variables_with_a_model_on_an_object_store(run: Path) -> None:
    fsspec.filesystem("s3", skip_instance_cache=True).put(str(run), "bucket/models/alphabet", recursive=True)
    variables = {
        "AIP_STORAGE_URI": "s3://bucket/models/alphabet",
        "AIP_HTTP_PORT": "8080",
        "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2",
        "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict",
    }
    with serve("--host=127.0.0.1", **variables) as server:  # and a port of the test's, for 8080 may be taken
        assert server.http.get(variables["AIP_HEALTH_ROUTE"]).status_code == 200
        body = {"instances": ["abc"], "parameters": {"maxOutputTokens": 2, "temperature": 0}}
        assert server.http.post(variables["AIP_PREDICT_ROUTE"], json=body).json() == {"predictions": ["de"]}


def test_a_token_comes_from_a_file_or_a_variable(run: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-file\n")
    for words, variables, token in (
        ([f"--token-file={tmp_path / 'token'}"], {}, "from-file"),
        ([], {"ELASTIC_GPT_TOKEN": "from-variable"}, "from-variable"),
    ):
        with serve(run, *words, **variables) as server:
            assert server.http.get("/v1/models").status_code == 401
            assert server.http.get("/v1/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
            assert token not in server.log


def test_mistakes_get_one_line_with_the_cure(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty-token").write_text("\n")
    no_tokenizer = tmp_path / "no-tokenizer"
    shutil.copytree(run, no_tokenizer)
    shutil.rmtree(no_tokenizer / "tokenizer")
    for words, variables, told in (
        ([], {}, "no MODEL"),
        ([tmp_path / "nowhere"], {}, "no run directory"),
        ([no_tokenizer], {}, "give --tokenizer DIR"),
        ([run, f"--token-file={tmp_path / 'empty-token'}"], {}, "is empty"),
        ([run, f"--token-file={tmp_path / 'none'}"], {}, "No such file"),
        ([run, "--slots=0"], {}, "whole number of 1 or more"),
        ([run, "--followw"], {}, "did you mean --follow?"),
        ([run], {"AIP_HTTP_PORT": "http"}, "AIP_HTTP_PORT is 'http'"),
        ([run], {"AIP_PREDICT_ROUTE": "predict"}, "AIP_PREDICT_ROUTE is 'predict'"),
    ):
        done = elastic_gpt("serve", *words, code=2, **variables)
        last = errors(done).splitlines()[-1]
        assert last.startswith("error: ")
        assert told in last, last


def test_a_wrong_or_taken_address_is_told_before_the_model_is_loaded(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = elastic_gpt("serve", run, f"--port={port}", code=1)  # it may be free by the next try
    assert (
        errors(done)
        == f"error: cannot listen on 127.0.0.1 port {port} (Address already in use): give --host or --port\n"
    )
    done = elastic_gpt("serve", run, "--host=999.0.0.1", code=1)  # and a name may resolve by then
    assert "error: cannot listen on 999.0.0.1" in errors(done)
