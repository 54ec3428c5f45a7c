"""GPT-2's architecture, and its later variants: tokens in, logits or a loss out. Knows nothing of files, ranks or training.

Pre-norm blocks, learned positions, tanh-GELU (Hugging Face's `gelu_new`; nanoGPT's is `gelu_erf`).
The head is tied to the token embedding by default, and the state dict then has no entry for it. The
names lead straight to Hugging Face's GPT-2: `wte`, `wpe`, `h.N.ln_1`, `h.N.attn`, `h.N.ln_2`,
`h.N.mlp.c_fc`, `h.N.mlp.c_proj`, `ln_f`, `lm_head`; only the attention has torch's names
`in_proj_weight`, `in_proj_bias` and `out_proj` for `c_attn` and `c_proj`.

Options for later variants: rotary positions, root-mean-square norms, normalized queries and keys,
squared ReLU or SwiGLU, fewer heads of keys and values. The defaults are GPT-2.

Letters in comments: B batch, T tokens, D embedding, H heads, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KeyValueCache, MultiheadAttention
from .cross_entropy import linear_cross_entropy, on_host
from .shape import GPTConfig as GPTConfig


class MLP(nn.Module):
    """The feed-forward half of a block, whose hidden layer is four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        inner = 4 * config.n_embd
        if config.activation == "swiglu":  # three matrices, each two thirds as wide, in multiples of 8
            inner = (2 * inner // 3 + 7) // 8 * 8
        self.c_fc = nn.Linear(config.n_embd, inner * (2 if config.activation == "swiglu" else 1), bias=config.bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activate(self.c_fc(x)))

    def activate(self, x: Tensor) -> Tensor:
        """What lies between the two products."""
        if self.activation in ("gelu", "gelu_erf"):
            return F.gelu(x, approximate="tanh" if self.activation == "gelu" else "none")
        if self.activation == "relu2":
            return F.relu(x).square()
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x


def _norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)


class Block(nn.Module):
    """Attention, then the feed-forward part. Each works on normalized input and is added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = MultiheadAttention(
            config.n_embd,
            config.n_head,
            dropout=config.dropout,
            bias=config.bias and config.qkv_bias,
            out_bias=config.bias,
            num_kv_heads=config.n_kv_head or None,
            qk_norm=config.qk_norm,
            rotary=config.positions == "rotary",
        )
        self.ln_2 = _norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.ln_1(x), is_causal=True, cache=cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class Head(nn.Module):
    """The parameters of the head. Its weight is None if it is the token embedding, so that it is not saved twice."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        weight = None if config.tied_head else nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.register_parameter("weight", weight)
        self.register_parameter("bias", nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None)


class GPT(nn.Module):
    """A GPT with random weights, drawn from torch's default generator with GPT-2's distribution."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size is still to be taken from the data"
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = _norm(config)
        self.lm_head = Head(config)
        self._initialize()

    def _initialize(self) -> None:
        """GPT-2's initialization: normal with deviation 0.02, biases 0, layer norms 1.

        Weights whose output is added to the residual stream are divided by the square root of the
        number of additions, which is 2 per layer (GPT-2 paper, section 2.3).
        """
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

        The loss is the *sum* of the cross-entropy over all B*T targets, a float32 scalar in nats.
        The caller divides it by the token count of the whole step. `cache` (see `new_cache`) has
        the tokens before `tokens`. Raises ValueError if the tokens, with those of the cache, are
        more than block_size.
        """
        x = self.hidden(tokens, cache)
        if targets is None:
            return self.logits(x)
        return self._loss(x.flatten(0, 1), targets.flatten())

    def new_cache(self) -> list[KeyValueCache]:
        """An empty cache for a generation of up to block_size tokens, with one entry for each layer."""
        return [KeyValueCache(self.config.block_size) for _ in self.h]

    def hidden(self, tokens: Tensor, cache: list[KeyValueCache] | None = None) -> Tensor:
        """The normalized output of the last block, (B,T,D); arguments as in `forward`."""
        end = tokens.size(1) + (cache[0].length if cache is not None else 0)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size {self.config.block_size}; give fewer")
        x = self.wte(tokens)  # BxTxD
        if self.wpe is not None:
            x = x + self.wpe.weight[end - tokens.size(1) : end]
        x = self.dropout(x)
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i])
        return self.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits (...,V) of what `hidden` gives (...,D)."""
        return F.linear(x, self.head_weight(), self.lm_head.bias)

    def head_weight(self) -> Tensor:
        """(V,D), that of the token embedding if the head is tied to it."""
        return self.wte.weight if self.lm_head.weight is None else self.lm_head.weight

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy of hidden vectors (N,D) against targets (N)."""
        host, large = on_host(x), self.config.vocab_size >= 8192
        narrow = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16
        # A CPU's small chunks would make a compiled graph of dozens of times the same.
        chunks = large and not torch.compiler.is_compiling() if host else True
        if narrow and chunks and x.dtype == torch.float32:
            return linear_cross_entropy(x, self.head_weight(), self.lm_head.bias, targets)
        if host and large and not narrow and x.dtype == torch.float32 and hasattr(F, "linear_cross_entropy"):
            # From torch 2.13 on, head and loss of 256 tokens at a time, so that the logits stay in the processor's cache.
            # A step of a small model is 1.6 times as fast with a vocabulary of 50,304, 1.2 times with 8,192, equal with 65.
            # Automatic chunks are slower than none. Without allow_retain_graph, torch.compile(fullgraph) fails.
            return F.linear_cross_entropy(
                x,
                self.head_weight(),
                targets,
                linear_bias=self.lm_head.bias,
                reduction="sum",
                options=nn.LinearCrossEntropyOptions(batch_chunk_size=256, allow_retain_graph=True),
            )
        # In float32 whatever the logits are: a sum of thousands has no digits left in bfloat16.
        return F.cross_entropy(self.logits(x).float(), targets, reduction="sum")

    def parameter_count(self) -> int:
        """Number of all parameters, position embeddings included. A tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> int:
        """Floating point operations per token, forward and backward, at the full block size: 6N + 12LHQT.

        As in PaLM, appendix B (arXiv 2204.02311), and nanoGPT's estimate_mfu. N does not count the
        position embeddings, since they are looked up and not multiplied; nor the token embedding,
        if the head has its own weight. 12LHQT is the attention to all T = block_size positions (L
        layers, H heads of width Q), though a causal kernel skips half of it.
        """
        config = self.config
        n = self.parameter_count() - (0 if self.wpe is None else self.wpe.weight.numel())
        if not config.tied_head:
            n -= self.wte.weight.numel()
        return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size

    def decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: matrices and embeddings decay, biases and layer norms do not."""
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    def block_matrices(self) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """The matrices of the blocks: each parameter, with the rows of the matrices that lie in it one above the other.

        Those are the projections to queries, keys and values, and SwiGLU's two.
        """
        for block in self.h:
            assert isinstance(block, Block)
            assert block.attn.in_proj_weight is not None
            yield block.attn.in_proj_weight, block.attn.rows
            yield block.attn.out_proj.weight, (self.config.n_embd,)
            rows = block.mlp.c_fc.weight.size(0)
            yield block.mlp.c_fc.weight, (rows // 2, rows // 2) if self.config.activation == "swiglu" else (rows,)
            yield block.mlp.c_proj.weight, (self.config.n_embd,)
