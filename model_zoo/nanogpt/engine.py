"""Runs many generations at once, each as if it were alone, in a batch that requests join and leave at any token.

A fixed number of cache slots, taken once; each running generation has one, and the running ones are always the first
slots, so that a forward pass reads the cache where it lies. Of a request that comes in, all but the last token are computed
alone (prefill), the last one with the others. Knows tokens, not text; one thread at a time.

Letters in comments: B batch (running generations), S slots, L layers, H heads of keys,
T block_size, D width of a head, V vocabulary.
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .attention import KeyValueCache
from .decode import next_logits
from .model import GPT
from .sampling import check_sampling, next_token, window_start


@dataclass(frozen=True)
class Request:
    """What to generate. Raises ValueError, with the cure, for settings that are not possible."""

    tokens: Sequence[int]
    """The prompt, at least one id. Of a long prompt the model sees only the end (see `window_start`)."""
    max_new_tokens: int
    temperature: float = 1.0
    """Divides the logits. 0: always take the likeliest token."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    """The same seed gives the same tokens, whatever else runs. None: other tokens each time."""
    stop_ids: Sequence[int] = ()
    """Ids that end the generation; they become its last token."""
    logprobs: int | None = None
    """How many of the likeliest tokens to return beside each token. None: no log probabilities."""

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        if not self.tokens:
            raise ValueError("there is no token to start from; give at least one")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")


@dataclass(frozen=True)
class Token:
    """One token of a generation."""

    id: int
    finished: Literal["stop", "length"] | None
    """Why this is the last token; None if it is not."""
    logprob: float | None = None
    """Natural logarithm of its probability, before temperature, top_k and top_p."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The likeliest ids with their log probabilities, the likeliest first."""


class Generation:
    """A request that is being generated. Callers compare it by identity and only read `request`."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request = request
        self.tokens = list(request.tokens)
        self.cached = (0, 0)
        """Range of `tokens` whose keys and values are in the slot: first index, and last index + 1."""
        self.generator = torch.Generator(device)
        if request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(request.seed)


class Engine:
    """Generates for many requests with one model.

    Args:
        model: a model in eval mode.
        slots: most generations that run at a time; others wait.
        vocab_size: ids from this one on are never drawn: a padded vocabulary has them, but the tokenizer does not.
    """

    def __init__(self, model: GPT, slots: int = 1, vocab_size: int | None = None) -> None:
        self.model, self.slots, self.vocab_size = model, slots, vocab_size
        self.running: list[Generation] = []
        """Running generations in the order of their slots."""
        self.waiting: collections.deque[Generation] = collections.deque()
        config = model.config
        heads = config.n_kv_head or config.n_head
        shape = (config.n_layer, slots, 2, heads, config.block_size, config.n_embd // config.n_head)
        # LxSx2xHxTxD, keys then values. Zeros: a place that is masked out still counts 0 times what it holds, and 0 times
        # the NaN that fresh memory may hold is NaN.
        self._memory = model.wte.weight.new_zeros(shape)

    def add(self, request: Request) -> Generation:
        """Generate `request` from the next step on, or as soon as a slot is free. Raises ValueError for bad ids."""
        if bad := [id_ for id_ in request.tokens if not 0 <= id_ < self.model.config.vocab_size]:
            raise ValueError(f"token id {bad[0]} is not in the vocabulary: 0 to {self.model.config.vocab_size - 1}")
        generation = Generation(request, self._memory.device)
        self.waiting.append(generation)
        return generation

    def drop(self, generation: Generation) -> None:
        """Stop a generation, whether it runs or waits. Does nothing if it is over."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        elif generation in self.running:
            slot, last = self.running.index(generation), len(self.running) - 1
            if slot != last:  # so that the running generations stay in the first slots
                length = self.running[last].cached[1] - self.running[last].cached[0]
                self._memory[:, slot, :, :, :length] = self._memory[:, last, :, :, :length]
                self.running[slot] = self.running[last]
            self.running.pop()

    def replace(self, model: GPT) -> None:
        """Go on with newer weights of the same shape. Running generations are computed anew from their tokens."""
        assert model.config == self.model.config
        self.model = model
        for generation in self.running:
            generation.cached = (0, 0)

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], likeliest: int) -> list[Token]:
        """The log probabilities of `tokens` (at most block_size), except the first, which has no context.

        Each comes with the `likeliest` tokens of the model in its place.
        """
        logits = self.model(torch.tensor([tokens], device=self._memory.device))[0, :-1, : self.vocab_size]
        logs = logits.float().log_softmax(-1)
        best = logs.topk(min(likeliest, logs.size(-1)))
        rows = zip(tokens[1:], logs, best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            Token(id_, None, float(log[id_]), tuple(zip(ids, values, strict=True))) for id_, log, ids, values in rows
        ]

    @torch.inference_mode()
    def step(self) -> list[tuple[Generation, Token]]:
        """Draw one token for each running generation. Those that are over leave their slots."""
        while self.waiting and len(self.running) < self.slots:
            self.running.append(self.waiting.popleft())
        if not self.running:
            return []
        for slot, generation in enumerate(self.running):
            place = window_start(len(generation.tokens), self.model.config.block_size), len(generation.tokens) - 1
            if generation.cached != place:
                self._prefill(slot, *place)
        drawn = list(zip(self.running, self._draw(self._next()), strict=True))
        for generation, token in drawn:
            if token.finished:
                self.drop(generation)
        return drawn

    def _prefill(self, slot: int, start: int, end: int) -> None:
        """Have the slot hold what its generation has from `start` up to `end`, all of it computed anew."""
        generation = self.running[slot]
        if start < end:
            window = torch.tensor([generation.tokens[start:end]], device=self._memory.device)
            layers = self._memory[:, slot : slot + 1].transpose(1, 2)  # each 2x1xHxTxD
            self.model.hidden(window, [KeyValueCache(layer.size(-2), layer) for layer in layers])
        generation.cached = (start, end)

    def _next(self) -> Tensor:
        """Logits (B,V) after the last token of each running generation, all but that one being cached."""
        tokens = [generation.tokens[-1] for generation in self.running]
        places = [end - start for start, end in (generation.cached for generation in self.running)]
        for generation in self.running:
            generation.cached = (generation.cached[0], generation.cached[1] + 1)
        return next_logits(self.model, self._memory, tokens, places)

    def _draw(self, logits: Tensor) -> list[Token]:
        """A token for each running generation from its row of `logits` (B,V)."""
        logits = logits[:, : self.vocab_size]
        # Rows with the same settings are drawn together: a row alone costs as much as all of them.
        alike: dict[tuple[float, int | None, float | None], list[int]] = {}
        for row, generation in enumerate(self.running):
            request = generation.request
            alike.setdefault((request.temperature, request.top_k, request.top_p), []).append(row)
        ids = [0] * len(self.running)
        for (temperature, top_k, top_p), rows in alike.items():
            drawn = next_token(
                logits if len(alike) == 1 else logits[rows],
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=[self.running[row].generator for row in rows],
            )
            for row, [id_] in zip(rows, drawn.tolist(), strict=True):
                ids[row] = id_
        return [self._token(*one) for one in zip(self.running, ids, logits, strict=True)]

    def _token(self, generation: Generation, id_: int, logits: Tensor) -> Token:
        """The token `id_` of a generation, whose logits were `logits` (V)."""
        request = generation.request
        generation.tokens.append(id_)
        finished: Literal["stop", "length"] | None = None
        if id_ in request.stop_ids:
            finished = "stop"
        elif len(generation.tokens) - len(request.tokens) >= request.max_new_tokens:
            finished = "length"
        if request.logprobs is None:
            return Token(id_, finished)
        logs = logits.float().log_softmax(-1)
        best = logs.topk(min(request.logprobs, logs.numel()))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(id_, finished, float(logs[id_]), likeliest)


def generate(model: GPT, request: Request, vocab_size: int | None = None) -> Iterator[int]:
    """Yields the ids of one request, one at a time."""
    engine = Engine(model, vocab_size=vocab_size)
    engine.add(request)
    while drawn := engine.step():
        yield from (token.id for _, token in drawn)
