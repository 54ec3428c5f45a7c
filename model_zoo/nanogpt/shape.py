"""The shape of a GPT, from which model.py builds it. Without torch, so that the Kubernetes client can check it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. The defaults are GPT-2 with 124,439,808 parameters. Raises ValueError if it is not possible."""

    vocab_size: int = 50257
    """Token ids the model knows, 0 to vocab_size - 1. 0: not known yet (the trainer takes it from the data)."""
    block_size: int = 1024
    """Longest sequence, in tokens; the number of learned positions."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads per block; a divisor of n_embd."""
    n_embd: int = 768
    """Width of the embedding: numbers per token."""
    dropout: float = 0.0
    """Probability of dropout while training, on embeddings, attention weights and residual branches."""
    bias: bool = True
    """Biases in linear layers and layer norms. False: only the head may have one."""
    qkv_bias: bool = True
    """Biases in the query, key and value projections too; needs `bias`."""
    tied_head: bool = True
    """Whether the head's weight is the token embedding."""
    head_bias: bool = False
    """A bias on the logits."""
    positions: Literal["learned", "rotary"] = "learned"
    """learned: a vector for each position, added once. rotary: queries and keys are turned in each layer (RoPE)."""
    norm: Literal["layer", "rms"] = "layer"
    """layer: LayerNorm. rms: RMSNorm, without mean and bias."""
    qk_norm: bool = False
    """Divide queries and keys by their root mean square."""
    activation: Literal["gelu", "gelu_erf", "relu2", "swiglu"] = "gelu"
    """Activation of the feed-forward half. gelu: the tanh form, GPT-2's. gelu_erf: the exact form, nanoGPT's, faster on
    CPUs unless compiled. swiglu: narrower, so that it has as many parameters."""
    n_kv_head: int = 0
    """Heads of keys and values per block; a divisor of n_head. 0: n_head."""

    def __post_init__(self) -> None:
        if self.vocab_size < 0:
            raise ValueError(f"model.vocab_size is {self.vocab_size}; give at least 1, or 0 to take it from the data")
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; give at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"model.n_embd {self.n_embd} is not a multiple of model.n_head {self.n_head}; change one")
        if self.n_kv_head < 0 or self.n_head % (self.n_kv_head or self.n_head):
            raise ValueError(f"model.n_kv_head {self.n_kv_head} does not divide model.n_head {self.n_head}; change one")
        if self.positions == "rotary" and self.n_embd // self.n_head % 2:
            raise ValueError(
                f"model.positions rotary turns pairs, and a head is {self.n_embd // self.n_head} wide:"
                " choose model.n_embd and model.n_head so that it is even"
            )
        if max(self.vocab_size, self.block_size, self.n_layer, self.n_embd) > 2**31 - 1:
            raise ValueError("model.vocab_size, block_size, n_layer and n_embd are at most 2,147,483,647; give less")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout is {self.dropout}; give a probability from 0 to below 1")

    @property
    def least_parameters(self) -> int:
        """Number of parameters in the matrices, found without building the model; a head that is not tied is not counted."""
        positions = self.block_size if self.positions == "learned" else 0
        keys_and_values = 2 * self.n_embd // self.n_head * (self.n_kv_head or self.n_head)
        # A block has E queries, the output of attention, and a feed-forward half of at least 8 E.
        return self.n_embd * (self.vocab_size + positions + self.n_layer * (10 * self.n_embd + keys_and_values))
