"""The terminal's door: text as it streams, how it stops, how one leaves, and what a user's mistake is answered with.

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
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from elastic_gpt.checkpoint import Checkpoints
from model_zoo.nanogpt.generate import _print_stream, load_model, main, text_stream
from model_zoo.nanogpt.model import GPT, GPTConfig
from prepare.tokenizer import Bytes, Characters, Tokenizer, train_bpe
from prepare.tokens import Meta, SplitRule
from tests.conftest import PATIENCE

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


def streamed(data: bytes, stops: Iterable[str] = ()) -> list[str]:
    return list(text_stream(data, Bytes(), stops))


def test_a_character_spread_over_ids_comes_whole_and_ordinary_text_at_once() -> None:
    assert streamed("a€😀b".encode())[:4] == ["a", "€", "😀", "b"]


def test_bytes_that_are_no_text_become_replacement_characters_and_hold_nothing_up() -> None:
    assert "".join(streamed(b"a\xffb\xe2\x82")) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("stops", [["STOP"], ["STOP", "never"], ["OP", "STOP"], ["STOP two", "STOP"], ["", "STOP"]])
def test_a_stop_spread_over_ids_is_found_and_left_out(stops: list[str]) -> None:
    assert "".join(streamed(b"one STO SSTOP two", stops)) == "one STO S"


def test_a_stop_of_characters_of_many_bytes_is_found() -> None:
    assert "".join(streamed("so €😀 it ends".encode(), ["€😀"])) == "so "


def test_the_earliest_of_two_stops_in_one_id_ends_the_text() -> None:
    tokenizer = train_bpe(["hello world hello world hello world"], 300)
    ids = tokenizer.encode("hello world").tolist()
    assert len(ids) <= 2
    assert "".join(text_stream(ids, tokenizer, ["wor", "ell"])) == "h"


def test_text_that_only_begins_like_a_stop_is_not_lost_at_the_end() -> None:
    pieces = streamed(b"abcST", ["STOP"])
    assert pieces[:3] == ["a", "b", "c"]  # not held back: no stop begins like this
    assert "".join(pieces) == "abcST"


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


def test_load_model_gives_back_the_trained_model_and_its_step(accents: Path) -> None:
    model, step = load_model(accents, torch.device("cpu"))
    expected = reciter(list(ACCENTS.encode()), 256).state_dict()
    assert step == 7
    assert not model.training
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items() if "lm_head" in name} == {
        "lm_head.weight": expected["lm_head.weight"].tolist()
    }


def test_a_prompt_is_answered_with_what_follows_it(alphabet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(alphabet), "--prompt", "abc", "--max-new-tokens", "30", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "defghijklmnopqrstuvwxyz\nabcdef\n"
    assert "model of step 7" in captured.err


def test_max_new_tokens_may_cut_a_character_without_harm(accents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(accents), "--prompt", "v", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "e \ufffd\n"


def test_stop_ends_the_reply_and_is_not_printed(accents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(accents), "--prompt", "n", "--temperature", "0", "--stop", "zzz", "--stop", "€😀"]) == 0
    assert capsys.readouterr().out == "aïve \n"


def test_an_empty_prompt_starts_a_text(alphabet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = ["--prompt", "", "--max-new-tokens", "3", "--temperature", "0"]
    assert main([str(alphabet), *greedy]) == 0  # no end-of-text id: from a newline
    assert capsys.readouterr().out == "abc\n"

    tokenizer = train_bpe(["abc"], 257)
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
        ([other_model], ["checkpoint of step 7: not the model in"]),
        ([no_tokenizer], ["no tokenizer folder", "--tokenizer DIR"]),
        ([alphabet, "--tokenizer", accents / "tokenizer"], ["256 ids, the model 27", "--tokenizer DIR"]),
        ([alphabet, "--tokenizer", tmp_path / "empty"], ["meta.json"]),
        ([alphabet, "--prompt", "aß"], ["'ß'"]),
        ([alphabet, "--temperature", "-1"], ["temperature is -1", "give 0"]),
        ([alphabet, "--top-p", "2"], ["top_p is 2"]),
        ([alphabet, "--max-new-tokens", "0"], ["--max-new-tokens is 0", "at least 1"]),
        ([alphabet, "--device", "gpu"], ["--device gpu", "cpu or cuda"]),
    ]
    for arguments, words in cases:
        assert main([*map(str, arguments), *([] if "--prompt" in arguments else ["--prompt", "a"])]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        last = captured.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert all(word in last for word in words), last
        assert len([line for line in captured.err.splitlines() if not line.startswith("model of step")]) == 1


CTRL_C, CTRL_D = b"\x03", b"\x04"
COMMAND = "import sys; from model_zoo.nanogpt.generate import main; sys.exit(main())"


@pytest.mark.parametrize("leave", [CTRL_C, CTRL_D], ids=["ctrl-c", "ctrl-d"])
def test_a_terminal_session_streams_and_survives_ctrl_c_in_a_reply_and_leaves_at_the_prompt(
    leave: bytes, alphabet: Path
) -> None:
    terminal, inner = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", COMMAND, str(alphabet), "--max-new-tokens", "100000000"],
        preexec_fn=lambda: os.login_tty(inner),  # its controlling terminal, so that the keys become signals
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(inner)
    said = ""

    def wait_for(text: str) -> None:
        """Read until `text` comes; forget all up to its end."""
        nonlocal said
        end = time.monotonic() + PATIENCE
        while text not in said:
            assert select.select([terminal], [], [], end - time.monotonic())[0], said[-500:]
            said += os.read(terminal, 65536).decode()
        said = said[said.index(text) + len(text) :]

    try:
        wait_for("GPT prompt > ")
        os.write(terminal, b"ab\n")
        wait_for("cdefghijklmnopqrstuvwxyz\r\nabc")  # while the reply is far from its end
        os.write(terminal, CTRL_C)
        wait_for("GPT prompt > ")
        os.write(terminal, b"xy\n")
        wait_for("z\r\nabcdef")
        os.write(terminal, CTRL_C)
        wait_for("GPT prompt > ")
        # A Ctrl-C in the instant between readline's printing of the prompt and its wait for keys is seen only with the
        # next key (CPython's readline.c); a person presses again, and so do we.
        for _ in range(6):
            os.write(terminal, leave)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        assert process.returncode == 0
        said += os.read(terminal, 65536).decode()
        assert "Traceback" not in said
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


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
