"""Runs many generations at once, each as if it were alone, in a batch that requests join and leave at any token.

The memory for a fixed number of cache slots is allocated once. Each running generation has a slot,
and these are always the first slots, so that a forward pass reads the cache without a copy. A new
request is computed alone (prefill), and from the next token on together with the others. The engine
knows tokens, not text. Only one thread may use it at a time.

Letters in comments: B batch (running generations), S slots, L layers, H heads of keys,
T block_size, D width of a head, V vocabulary.
"""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .attention import KeyValueCache, RowsCache
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
        shape = (config.n_layer, 2, slots, heads, config.block_size, config.n_embd // config.n_head)
        # Lx2xSxHxTxD, keys then values. Zeros, since a masked position still counts 0 times its value, and fresh memory may
        # have a NaN, and 0 times NaN is NaN.
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
                self._memory[:, :, slot, :, :length] = self._memory[:, :, last, :, :length]
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
        together: list[int] = []
        logits: dict[int, Tensor] = {}
        for slot, generation in enumerate(self.running):
            length = len(generation.tokens)
            if generation.cached == (window_start(length, self.model.config.block_size), length - 1):
                together.append(slot)
            else:
                logits[slot] = self._prefill(slot, generation)
        if together:
            rows = self._next(together)
            logits |= {slot: rows[row : row + 1] for row, slot in enumerate(together)}
        drawn = [(generation, self._draw(generation, logits[slot])) for slot, generation in enumerate(self.running)]
        for generation, token in drawn:
            if token.finished:
                self.drop(generation)
        return drawn

    def _prefill(self, slot: int, generation: Generation) -> Tensor:
        """Logits (1,V) after all tokens in the window, computed from its start."""
        start, end = window_start(len(generation.tokens), self.model.config.block_size), len(generation.tokens)
        window = torch.tensor([generation.tokens[start:]], device=self._memory.device)
        cache = [KeyValueCache(memory.size(-2), memory[:, slot : slot + 1]) for memory in self._memory]
        generation.cached = (start, end)
        return self.model.next_logits(window, cache)

    def _next(self, slots: list[int]) -> Tensor:
        """Logits (B,V) after the last token in each of `slots`. All tokens before it are in the cache."""
        device = self._memory.device
        running = [self.running[slot] for slot in slots]
        lengths = [generation.cached[1] - generation.cached[0] for generation in running]
        last = torch.tensor([[generation.tokens[-1]] for generation in running], device=device)
        for generation in running:
            generation.cached = (generation.cached[0], generation.cached[1] + 1)
        return self.model.next_logits(last, RowsCache.layers(self._memory, slots, lengths))

    def _draw(self, generation: Generation, logits: Tensor) -> Token:
        request, logits = generation.request, logits[:, : self.vocab_size]
        drawn = next_token(
            logits,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            generator=generation.generator,
        )
        id_ = int(drawn.item())
        generation.tokens.append(id_)
        finished: Literal["stop", "length"] | None = None
        if id_ in request.stop_ids:
            finished = "stop"
        elif len(generation.tokens) - len(request.tokens) >= request.max_new_tokens:
            finished = "length"
        if request.logprobs is None:
            return Token(id_, finished)
        logs = logits[0].float().log_softmax(-1)
        best = logs.topk(min(request.logprobs, logs.numel()))
        likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(id_, finished, float(logs[id_]), likeliest)


def generate(model: GPT, request: Request, vocab_size: int | None = None) -> Iterator[int]:
    """Yields the ids of one request, one at a time."""
    engine = Engine(model, vocab_size=vocab_size)
    engine.add(request)
    while drawn := engine.step():
        yield from (token.id for _, token in drawn)
