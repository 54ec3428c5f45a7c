"""generate.py: how text streams and stops, how one leaves, and how mistakes are answered.

The runs here hold a model made by hand that recites: after each byte or character comes the next of a fixed text.
"""

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import fsspec
import pytest
import torch
import yaml

from elastic_gpt.checkpoint import Checkpoints
from model_zoo.nanogpt.generate import _print_stream, main
from model_zoo.nanogpt.model import GPT, GPTConfig
from prepare.tokenizer import Bytes, Characters, Tokenizer
from prepare.tokens import Meta, SplitRule
from tests.conftest import PATIENCE, trained_bpe

ALPHABET = "abcdefghijklmnopqrstuvwxyz\n"
ACCENTS = "naïve €😀\n"


def reciter(ids: list[int], vocab_size: int) -> GPT:
    """A model that says `ids` in a circle, each id being there once. Blocks add nothing; the head knows the order."""
    model = GPT(GPTConfig(vocab_size, block_size=16, n_layer=1, n_head=1, n_embd=vocab_size, tied_head=False))
    with torch.no_grad():
        for name in ("wpe.weight", "h.0.attn.out_proj.weight", "h.0.mlp.c_proj.weight", "lm_head.weight"):
            model.get_parameter(name).zero_()
        model.wte.weight.copy_(torch.eye(vocab_size))
        for now, after in zip(ids, ids[1:] + ids[:1], strict=True):
            model.get_parameter("lm_head.weight")[after, now] = 100
    return model


def write_run(folder: Path, tokenizer: Tokenizer, model: GPT, step: int = 7) -> Path:
    """A run directory as training leaves it."""
    (folder / "tokenizer").mkdir(parents=True)
    section = tokenizer.save(folder / "tokenizer")
    rule = SplitRule("tail", None, 0.1)
    meta = Meta(1, "uint16", tokenizer.vocab_size, section, tokenizer.eot_id, {}, [], rule, {})
    (folder / "tokenizer/meta.json").write_text(json.dumps(asdict(meta)))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 1, "model": asdict(model.config)}))
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(step, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, [])
    assert checkpoints.finished(wait=True) == step
    return folder


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Characters(ALPHABET)
    model = reciter(tokenizer.encode(ALPHABET).tolist(), tokenizer.vocab_size)
    return write_run(tmp_path_factory.mktemp("alphabet") / "run", tokenizer, model)


@pytest.fixture(scope="module")
def accents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("accents") / "run", Bytes(), reciter(list(ACCENTS.encode()), 256))


def test_each_piece_is_out_before_the_next_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(terminal))
    seen = []

    def pieces() -> Iterator[str]:
        for piece in "abc":
            yield piece
            seen.append(terminal.getvalue())

    _print_stream(pieces())
    assert seen == [b"a", b"ab", b"abc"]


def test_a_prompt_is_answered_with_what_follows_it(alphabet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(alphabet), "--prompt", "abc", "--max-new-tokens", "30", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "defghijklmnopqrstuvwxyz\nabcdef\n"
    assert "model of step 7" in captured.err


def test_max_new_tokens_may_cut_a_character_without_harm(accents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(accents), "--prompt", "v", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "e \ufffd\n"


@pytest.mark.usefixtures("s3_server")
def test_a_run_on_an_object_store_answers_by_its_url(alphabet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fsspec.filesystem("s3", skip_instance_cache=True).put(str(alphabet), "bucket/generate", recursive=True)
    greedy = ["--prompt", "x", "--max-new-tokens", "2", "--temperature", "0"]
    assert main(["s3://bucket/generate", *greedy]) == 0
    assert capsys.readouterr().out == "yz\n"


def test_stop_ends_the_reply_and_is_not_printed(accents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(accents), "--prompt", "n", "--temperature", "0", "--stop", "zzz", "--stop", "€😀"]) == 0
    assert capsys.readouterr().out == "aïve \n"


def test_an_empty_prompt_starts_a_text(alphabet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = ["--prompt", "", "--max-new-tokens", "3", "--temperature", "0"]
    assert main([str(alphabet), *greedy]) == 0  # no end-of-text id: from a newline
    assert capsys.readouterr().out == "abc\n"

    tokenizer = trained_bpe(["abc"], 257)
    assert tokenizer.eot_id == 256
    run = write_run(tmp_path / "run", tokenizer, reciter([256, *tokenizer.encode("xyz").tolist()], 257))
    assert main([str(run), "--prompt", "", "--temperature", "0"]) == 0  # ends where the next text would begin
    assert capsys.readouterr().out == "xyz\n"


def test_the_same_seed_gives_the_same_reply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    run = write_run(tmp_path / "run", Bytes(), GPT(GPTConfig(300, block_size=8, n_layer=1, n_head=1, n_embd=8)))

    def reply(*options: str) -> str:
        assert main([str(run), "--prompt", "a", "--max-new-tokens", "20", *options]) == 0
        return capsys.readouterr().out

    assert reply("--seed", "1") == reply("--seed", "1")
    assert reply("--seed", "1") != reply("--seed", "2")
    assert reply() != reply()


@pytest.mark.parametrize("leave", ["exit\n", "quit\n", " exit \n", ""])
def test_a_talk_goes_on_until_exit_quit_or_the_end_of_input(
    leave: str, alphabet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("xy\nA\nef\n" + leave))
    assert main([str(alphabet), "--temperature", "0", "--max-new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split("GPT prompt > ")[1:4] == ["z\n\n", "", "gh\n"]
    assert "error: character 'A'" in captured.err  # and the talk went on


def test_mistakes_get_one_line_with_the_cure(
    alphabet: Path, accents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    no_model = tmp_path / "no_model"
    no_model.mkdir()
    for name in ("checkpoints", "tokenizer"):
        (no_model / name).symlink_to(alphabet / name)
    other_model = tmp_path / "other_model"
    other_model.mkdir()
    (other_model / "checkpoints").symlink_to(alphabet / "checkpoints")
    (other_model / "config.yaml").write_text((accents / "config.yaml").read_text())
    no_tokenizer = tmp_path / "no_tokenizer"
    no_tokenizer.mkdir()
    for name in ("checkpoints", "config.yaml"):
        (no_tokenizer / name).symlink_to(alphabet / name)
    cases: list[tuple[list[Path | str], list[str]]] = [
        ([tmp_path / "nowhere"], ["no run directory", "nowhere", "elastic-gpt train"]),
        ([tmp_path / "empty"], ["no checkpoint in", "yet"]),
        ([no_model], ["config.yaml describes no model", "restore"]),
        ([other_model], ["checkpoint of step 7: not the model in its configuration"]),
        ([no_tokenizer], ["no tokenizer in", "--tokenizer DIR"]),
        ([alphabet, "--tokenizer", accents / "tokenizer"], ["256 ids, the model 27", "--tokenizer DIR"]),
        ([alphabet, "--tokenizer", tmp_path / "empty"], ["meta.json"]),
        ([alphabet, "--prompt", "aß"], ["'ß'"]),
        ([alphabet, "--temperature", "-1"], ["temperature is -1", "give 0"]),
        ([alphabet, "--top-p", "2"], ["top_p is 2"]),
        ([alphabet, "--max-new-tokens", "0"], ["--max-new-tokens is 0", "at least 1"]),
        ([alphabet, "--device", "gpu"], ["--device gpu", "cpu or cuda"]),
    ]
    for arguments, words in cases:
        assert main([*map(str, arguments), *([] if "--prompt" in arguments else ["--prompt", "a"])]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        last = captured.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert all(word in last for word in words), last
        assert len([line for line in captured.err.splitlines() if not line.startswith("model of step")]) == 1


CTRL_C, CTRL_D = b"\x03", b"\x04"
COMMAND = "import sys; from model_zoo.nanogpt.generate import main; sys.exit(main())"


class Terminal:
    """`elastic-gpt generate` in a terminal of its own, typed into as a person does."""

    def __init__(self, run: Path, home: Path, *words: str) -> None:
        self.end, inner = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", COMMAND, str(run), *words],
            preexec_fn=lambda: os.login_tty(inner),  # its controlling terminal, so that the keys become signals
            env={**os.environ, "TERM": "dumb", "HOME": str(home), "XDG_STATE_HOME": ""},
        )
        os.close(inner)
        self.said = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def wait_for(self, text: str) -> None:
        """Read until `text` comes; forget all up to its end."""
        end = time.monotonic() + PATIENCE
        while text not in self.said:
            assert select.select([self.end], [], [], end - time.monotonic())[0], self.said[-500:]
            self.said += os.read(self.end, 65536).decode()
        self.said = self.said[self.said.index(text) + len(text) :]

    def type(self, keys: bytes) -> None:
        os.write(self.end, keys)

    def leave(self, key: bytes) -> None:
        # A Ctrl-C in the instant between readline's printing of the prompt and its wait for keys is seen only with the
        # next key (CPython's readline.c); a person presses again, and so do we.
        for _ in range(6):
            self.type(key)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
                break
        assert self.process.returncode == 0
        self.said += os.read(self.end, 65536).decode()
        assert "Traceback" not in self.said


@pytest.mark.parametrize("leave", [CTRL_C, CTRL_D], ids=["ctrl-c", "ctrl-d"])
def test_a_terminal_session_streams_and_survives_ctrl_c_in_a_reply_and_leaves_at_the_prompt(
    leave: bytes, alphabet: Path, tmp_path: Path
) -> None:
    with Terminal(alphabet, tmp_path, "--max-new-tokens", "100000000") as terminal:
        terminal.wait_for("GPT prompt > ")
        terminal.type(b"ab\n")
        terminal.wait_for("cdefghijklmnopqrstuvwxyz\r\nabc")  # while the reply is far from its end
        terminal.type(CTRL_C)
        terminal.wait_for("GPT prompt > ")
        terminal.type(b"xy\n")
        terminal.wait_for("z\r\nabcdef")
        terminal.type(CTRL_C)
        terminal.wait_for("GPT prompt > ")
        terminal.leave(leave)


def test_a_prompt_of_an_earlier_session_comes_back_with_the_arrow_key(alphabet: Path, tmp_path: Path) -> None:
    few = ["--max-new-tokens", "2", "--temperature", "0"]
    with Terminal(alphabet, tmp_path, *few) as terminal:
        terminal.wait_for("GPT prompt > ")
        terminal.type(b"lmn\n")
        terminal.wait_for("op\r\n")
        terminal.wait_for("GPT prompt > ")
        terminal.leave(CTRL_D)
    with Terminal(alphabet, tmp_path, *few) as terminal:
        terminal.wait_for("GPT prompt > ")
        terminal.type(b"\x1b[A\n")
        terminal.wait_for("lmn\r\nop\r\n")
        terminal.wait_for("GPT prompt > ")
        terminal.leave(CTRL_D)
    [kept] = tmp_path.rglob("prompts")
    assert kept.stat().st_mode & 0o077 == 0


def test_ctrl_c_in_the_only_reply_leaves_without_a_traceback(
    alphabet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(io.StringIO):
        """A terminal whose reader presses Ctrl-C at the sight of a z."""

        def write(self, text: str) -> int:
            if text == "z":
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    terminal = Impatient()
    monkeypatch.setattr("sys.stdout", terminal)
    assert main([str(alphabet), "--prompt", "u", "--max-new-tokens", "100000000"]) == 130
    assert terminal.getvalue() == "vwxy\n"
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_reader_that_goes_away_ends_the_reply_without_a_traceback(alphabet: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        COMMAND,
        str(alphabet),
        "--prompt",
        "a",
        "--max-new-tokens",
        "100000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"bcdefghijklmnopqrstuvwxyz\n"
        process.stdout.close()
        assert len(process.stderr.read().splitlines()) == 1
