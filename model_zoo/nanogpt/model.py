"""GPT-2's architecture: tokens in, logits or a loss out. Knows nothing of files, ranks or training.

Pre-norm blocks, learned positions, tanh-GELU (Hugging Face's `gelu_new`; nanoGPT uses erf). The head is tied to the
token embedding by default, and the state dict then has no entry for it. The names lead straight to Hugging Face's
GPT-2: `wte`, `wpe`, `h.N.ln_1`, `h.N.attn`, `h.N.ln_2`, `h.N.mlp.c_fc`, `h.N.mlp.c_proj`, `ln_f`, `lm_head`; only the
attention says `in_proj_weight`, `in_proj_bias` and `out_proj`, torch's names, for `c_attn` and `c_proj`.

Letters in comments: B batch, T tokens, D embedding, H heads, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KeyValueCache, MultiheadAttention


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 with 124,439,808 parameters. Raises ValueError where it makes none."""

    vocab_size: int = 50257
    """Token ids the model knows, 0 to vocab_size - 1. 0: not known yet (the trainer takes it from the data)."""
    block_size: int = 1024
    """Longest sequence, in tokens; the number of learned positions."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads a block; a divisor of n_embd."""
    n_embd: int = 768
    """Width of the embedding, in numbers a token."""
    dropout: float = 0.0
    """Probability of dropout while training, on embeddings, attention weights and residual branches."""
    bias: bool = True
    """Biases in linears and layer norms. False: none but those of the head."""
    qkv_bias: bool = True
    """Biases in the query, key and value projections too; needs `bias`."""
    tied_head: bool = True
    """The head's weight is the token embedding's."""
    head_bias: bool = False
    """A bias on the logits."""

    def __post_init__(self) -> None:
        if self.vocab_size < 0:
            raise ValueError(f"model.vocab_size is {self.vocab_size}; give at least 1, or 0 to take it from the data")
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; give at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"model.n_embd {self.n_embd} is not a multiple of model.n_head {self.n_head}; change one")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; give a probability from 0 to below 1")


class MLP(nn.Module):
    """The feed-forward half of a block, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then the feed-forward part, each on a normalized copy and added to the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = MultiheadAttention(
            config.n_embd,
            config.n_head,
            dropout=config.dropout,
            bias=config.bias and config.qkv_bias,
            out_bias=config.bias,
        )
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), is_causal=True, cache=cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Head(nn.Module):
    """The parameters of the head; its weight is None where it is the token embedding's, so that none is saved twice."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        weight = None if config.tied_head else nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.register_parameter("weight", weight)
        self.register_parameter("bias", nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None)


class GPT(nn.Module):
    """A GPT with fresh weights, drawn from torch's default generator as GPT-2's were."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size is still to be taken from the data"
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.lm_head = Head(config)
        self._initialize()

    def _initialize(self) -> None:
        """GPT-2's start: normal with deviation 0.02; what is added to the residual stream is scaled down by the number
        of additions, 2 a layer (GPT-2 paper, section 2.3). Biases are 0 already, or are made so; layer norms are 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("attn.out_proj.weight", "mlp.c_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: list[KeyValueCache] | None = None
    ) -> Tensor:
        """Logits (B,T,V) of `tokens`, int64 (B,T); or, with `targets`, int64 (B,T), the loss.

        The loss is the *sum* of the cross-entropy over all B*T targets, a float32 scalar in nats: the caller divides by
        the token count of the whole step, which no single forward knows. `cache` (see `new_cache`) holds what came
        before `tokens`. Raises ValueError where the tokens, with those of the cache, are more than block_size.
        """
        x = self._hidden(tokens, cache)
        if targets is None:
            return self._logits(x)
        return self._loss(x.flatten(0, 1), targets.flatten())

    def next_logits(self, tokens: Tensor, cache: list[KeyValueCache]) -> Tensor:
        """Logits (B,V) of the token after the last of `tokens` (B,T): the head, a third of GPT-2's work at a single
        token, is spared on all positions but that one."""
        return self._logits(self._hidden(tokens, cache)[:, -1])

    def new_cache(self) -> list[KeyValueCache]:
        """An empty cache for one generation of up to block_size tokens, an entry a layer."""
        return [KeyValueCache(self.config.block_size) for _ in self.h]

    def _hidden(self, tokens: Tensor, cache: list[KeyValueCache] | None) -> Tensor:
        """The normalized output of the last block, (B,T,D)."""
        start = cache[0].length if cache is not None else 0
        end = start + tokens.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size {self.config.block_size}; give fewer")
        x = self.dropout(self.wte(tokens) + self.wpe.weight[start:end])  # BxTxD
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i])
        return self.ln_f(x)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self._head_weight(), self.lm_head.bias)

    def _head_weight(self) -> Tensor:
        return self.wte.weight if self.lm_head.weight is None else self.lm_head.weight

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy of hidden vectors (N,D) against targets (N)."""
        large = self.config.vocab_size >= 8192 and x.device.type == "cpu" and x.dtype == torch.float32
        if large and hasattr(F, "linear_cross_entropy"):
            # From torch 2.13 on: head and loss 256 tokens at a time, so that the logits stay in the processor's cache.
            # A whole step of a small model at vocabulary 50,304 is 1.6 times as fast, at 8,192 1.2 times, at 65 equal.
            # The automatic chunks are slower than none; without allow_retain_graph torch.compile(fullgraph) fails.
            return F.linear_cross_entropy(
                x,
                self._head_weight(),
                targets,
                linear_bias=self.lm_head.bias,
                reduction="sum",
                options=nn.LinearCrossEntropyOptions(batch_chunk_size=256, allow_retain_graph=True),
            )
        # In float32 whatever the logits are: a sum of thousands has no digits left in bfloat16.
        return F.cross_entropy(self._logits(x).float(), targets, reduction="sum")

    def parameter_count(self) -> int:
        """All parameters, position embeddings included; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating point operations a token, forward and backward, at the full block size: 6N + 12LHQT.

        PaLM, appendix B (arXiv 2204.02311), as nanoGPT's estimate_mfu counts: N leaves out the position embeddings,
        which are looked up and not multiplied; for the same reason it leaves out the token embedding where the head has
        a weight of its own. 12LHQT is the attention to all T = block_size positions (H heads of width Q), though a
        causal kernel skips half of it.
        """
        config = self.config
        n = self.parameter_count() - self.wpe.weight.numel()
        if not config.tied_head:
            n -= self.wte.weight.numel()
        return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size

    def decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, GPT-2's: matrices and embeddings decay, biases and layer norms do not."""
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
