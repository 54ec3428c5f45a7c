"""evaluate.py: the same loss as in training, each token scored once, and bits per byte."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from elastic_gpt.evaluator import Evaluator
from elastic_gpt.world import World
from model_zoo.nanogpt.evaluate import evaluate, main
from model_zoo.nanogpt.model import GPT
from prepare.prepare import main as prepare
from prepare.tokenizer import Bytes, Words
from tests.conftest import trained_bpe
from tests.nanogpt.test_generate import write_run
from tests.nanogpt.test_loading import TINY, random_model


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint16)


@pytest.mark.parametrize("sequences", [5, 24, 1000])
def test_the_number_is_that_of_trainings_evaluator_on_the_same_sequences(
    model: GPT, ids: np.ndarray, sequences: int
) -> None:
    world = World(0, 1, 0, "single", torch.device("cpu"), False)
    evaluator = Evaluator(model, model, ids, block_size=16, sequences=sequences, micro_batch=4, world=world)
    expected = evaluator.evaluate()
    model.eval()
    assert evaluate(model, ids, sequences=sequences, batch=4).loss == expected


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_each_token_is_scored_once_with_the_context_that_its_stride_promises(
    model: GPT, ids: np.ndarray, stride: int
) -> None:
    """The definition, a token at a time."""
    ids = ids[:100]
    losses = []
    with torch.no_grad():
        for place in range(1, 100):
            context = 0 if place <= 16 else -(-(place - 16) // stride) * stride
            if context + 17 > 100:
                break
            window = torch.from_numpy(ids[context:place].astype(np.int64))[None]
            losses.append(F.cross_entropy(model(window)[0, -1:], torch.tensor([int(ids[place])])).item())
    score = evaluate(model, ids, stride=stride, batch=3)
    assert (score.tokens, score.left_out) == (len(losses), 100 - len(losses))
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))


def test_bits_per_byte_count_the_bytes_that_the_scored_tokens_stand_for(model: GPT) -> None:
    tokenizer = trained_bpe(["low lower lowest " * 20], 270)
    text = "low lower lowest " * 40
    ids = np.append(tokenizer.encode(text), tokenizer.eot_id).astype(np.uint16)
    assert tokenizer.eot_id is not None
    wide = random_model(TINY.__class__(**{**TINY.__dict__, "vocab_size": 270}))
    score = evaluate(wide, ids, tokenizer, stride=1)
    assert score.tokens == len(ids) - 1
    size = len(text) - len(tokenizer.decode_bytes(ids[:1]))  # the end of text is no byte of it
    assert score.bits_per_byte == pytest.approx(score.loss * score.tokens / math.log(2) / size)
    byte = evaluate(model, np.frombuffer(b"abc" * 20, np.uint8), Bytes())
    assert byte.bits_per_byte == pytest.approx(byte.loss / math.log(2))


def test_words_that_the_tokenizer_lacks_have_no_bytes_and_so_no_bits_per_byte() -> None:
    wide = random_model(TINY)
    ids = np.array([1, 2, 0] * 20, dtype=np.uint16)
    assert evaluate(wide, ids, Words([f"w{n}" for n in range(254)])).bits_per_byte is None
    assert evaluate(wide, ids[ids > 0], Words([f"w{n}" for n in range(254)])).bits_per_byte is not None


def test_the_command_finds_the_runs_data_and_prints_json_or_a_line(
    model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words to be read again " * 200)
    for kind in ("byte", "char"):
        folder = str(tmp_path / kind)
        assert prepare([str(tmp_path / "text.txt"), "--tokenizer", kind, "--output-dir", folder]) in (0, None)
    run = write_run(tmp_path / "run", Bytes(), model)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"{config}data: {{dir: {tmp_path / 'byte'}}}\n")
    capsys.readouterr()
    assert main([str(run), "--json", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["step"] == 7
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    assert main([str(run), "--split", "train", "--stride", "4"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    for words, complaint in (
        (["--data", str(tmp_path / "char")], "another tokenizer"),
        (["--stride", "17"], "--stride is 17"),
        (["--data", str(tmp_path)], "prepare the data first"),
    ):
        assert main([str(run), *words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("model of")]
        assert line.startswith("error: ")
        assert complaint in line
