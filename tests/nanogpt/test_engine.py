"""engine.py: each generation is the same as alone and without a cache, whatever other requests come and go."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import nn

from model_zoo.nanogpt.engine import Engine, Generation, Request, Token, generate
from model_zoo.nanogpt.model import GPT, GPTConfig
from model_zoo.nanogpt.sampling import next_token, window_start

MODERN = {"positions": "rotary", "norm": "rms", "qk_norm": True, "activation": "relu2", "n_kv_head": 1}


def make_model(seed: int, **variant: Any) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=37, block_size=12, n_layer=2, n_head=2, n_embd=16, **variant)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module", params=[{}, MODERN], ids=["gpt2", "modern"])
def model(request: pytest.FixtureRequest) -> GPT:
    return make_model(0, **request.param)


def prompt(length: int) -> list[int]:
    return torch.randint(37, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def without_cache(model: GPT, request: Request) -> list[int]:
    """The definition: the next token after the window, all of it computed anew for each token."""
    tokens, generator = list(request.tokens), torch.Generator()
    if request.seed is not None:
        generator.manual_seed(request.seed)
    drawing = {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
    for _ in range(request.max_new_tokens):
        window = torch.tensor([tokens[window_start(len(tokens), model.config.block_size) :]])
        with torch.no_grad():
            tokens.append(int(next_token(model(window)[:, -1], generator=generator, **drawing)))
        if tokens[-1] in request.stop_ids:
            break
    return tokens[len(request.tokens) :]


def finish(engine: Engine, found: dict[Generation, list[Token]]) -> None:
    while drawn := engine.step():
        for generation, token in drawn:
            found.setdefault(generation, []).append(token)


def ids(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.parametrize("length", [1, 5, 12, 13, 40])
def test_a_generation_is_that_without_a_cache_also_beyond_the_block(model: GPT, length: int) -> None:
    for options in ({"temperature": 0}, {"seed": 3}, {"seed": 3, "temperature": 0.7, "top_k": 9, "top_p": 0.8}):
        request = Request(prompt(length), 40, **options)
        assert list(generate(model, request)) == without_cache(model, request)


def test_requests_that_come_and_go_in_a_batch_get_what_they_get_alone(model: GPT) -> None:
    """Prompts, lengths, settings and moments at random; some are dropped in the middle."""
    chance = random.Random(1)
    engine, found, dropped = Engine(model, slots=3), {}, set()
    pending = [
        Request(
            prompt(n),
            chance.randint(1, 30),
            temperature=chance.choice([0, 0.8]),
            top_k=chance.choice([None, 9]),
            seed=n,
        )
        for n in range(1, 25)
    ]
    requests = list(pending)
    while pending or engine.waiting or engine.running:
        if pending and chance.random() < 0.4:
            engine.add(pending.pop())
        assert len(engine.running) <= 3
        for generation, token in engine.step():
            found.setdefault(generation, []).append(token)
        if engine.running and chance.random() < 0.05:
            victim = chance.choice(engine.running)
            engine.drop(victim)
            dropped.add(victim)
    assert {id(generation.request) for generation in found} == {id(request) for request in requests}
    assert dropped
    for generation, tokens in found.items():
        expected = without_cache(model, generation.request)
        assert ids(tokens) == (expected[: len(tokens)] if generation in dropped else expected)


def test_nan_in_fresh_memory_does_not_reach_a_short_row(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 times NaN is NaN, so a mask alone does not hide what is in fresh memory."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape: t.new_full(shape[0], float("nan")))
    engine, found = Engine(model, slots=2), {}
    short, long = Request(prompt(1), 3, temperature=0), Request(prompt(9), 3, temperature=0)
    generations = [engine.add(short), engine.add(long)]
    finish(engine, found)
    assert [ids(found[generation]) for generation in generations] == [without_cache(model, r) for r in (short, long)]


def test_newer_weights_are_taken_over_in_the_middle_and_no_request_is_lost(model: GPT) -> None:
    engine, newer, found = Engine(model, slots=2), make_model(1, **(MODERN if model.config.n_kv_head else {})), {}
    generations = [engine.add(Request(prompt(n), 20, temperature=0)) for n in (3, 9, 5)]
    for _ in range(4):
        for generation, token in engine.step():
            found.setdefault(generation, []).append(token)
    engine.replace(newer)
    finish(engine, found)
    for generation in generations[:2]:
        first = ids(found[generation])[:4]
        rest = Request([*generation.request.tokens, *first], 16, temperature=0)
        assert ids(found[generation]) == first + without_cache(newer, rest)
    assert ids(found[generations[2]]) == without_cache(newer, generations[2].request)


def test_a_generation_ends_with_its_stop_id_or_its_last_token_and_says_which(model: GPT) -> None:
    whole = without_cache(model, Request(prompt(4), 30, seed=5))
    stop = whole[7]
    assert whole.index(stop) > 1
    found: dict[Generation, list[Token]] = {}
    engine = Engine(model, slots=2)
    first = engine.add(Request(prompt(4), 30, seed=5, stop_ids=[stop]))
    second = engine.add(Request(prompt(4), 3, seed=5))
    finish(engine, found)
    stopped, cut = found[first], found[second]
    assert ids(stopped) == whole[: whole.index(stop) + 1]
    assert [token.finished for token in stopped] == [None] * whole.index(stop) + ["stop"]
    assert [token.finished for token in cut] == [None, None, "length"]


def test_log_probabilities_are_those_of_the_model_before_any_setting(model: GPT) -> None:
    engine, found = Engine(model), {}
    engine.add(Request(prompt(4), 6, temperature=0.3, top_k=2, seed=1, logprobs=3))
    finish(engine, found)
    (tokens,) = found.values()
    text = prompt(4)
    for token in tokens:
        with torch.no_grad():
            expected = model(torch.tensor([text]))[0, -1].log_softmax(-1)
        best = expected.topk(3)
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        assert [id_ for id_, _ in token.likeliest] == best.indices.tolist()
        assert [value for _, value in token.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
        text.append(token.id)


def test_a_reply_taken_up_again_goes_on_as_if_never_interrupted(model: GPT) -> None:
    whole = list(generate(model, Request(prompt(5), 40, temperature=0)))
    again = Request(prompt(5) + whole[:22], 18, temperature=0)
    assert list(generate(model, again)) == whole[22:]


def test_the_same_seed_gives_the_same_tokens_and_no_seed_others(model: GPT) -> None:
    def run(seed: int | None) -> list[int]:
        return list(generate(model, Request(prompt(3), 30, top_p=0.95, seed=seed)))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_ids_that_the_tokenizer_lacks_are_never_drawn(model: GPT) -> None:
    assert set(generate(model, Request(prompt(2), 300, temperature=5.0, seed=0), vocab_size=3)) == {0, 1, 2}


def test_impossible_settings_are_refused_before_the_first_token(model: GPT) -> None:
    request = Request([1], 1)
    for changes, message in (
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"tokens": []}, "no token to start from"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(request, **changes)
    with pytest.raises(ValueError, match="token id 37"):
        Engine(model).add(Request([37], 1))
