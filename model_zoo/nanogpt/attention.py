"""Multi-head attention in the names of `torch.nn.MultiheadAttention`, on `scaled_dot_product_attention` (SDPA).

Parameters, state dict and the meaning of masks are those of torch's with `batch_first=True`, and
`load_state_dict` works in both directions. Differences: only the output is returned (SDPA never
forms the attention weights), `is_causal` needs no mask beside it, the output bias can be chosen
separately, and there is a key-value cache for generation. Options that torch's does not have: fewer
heads for keys and values than for queries (`num_kv_heads`), normalized queries and keys
(`qk_norm`), and rotary positions (`rotary`).

Letters in comments: B batch, T query tokens, S key tokens, E embedding, H heads, G heads of keys
and values, D = E / H.
"""

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Keys up to which bfloat16 attention on a CPU is computed in float32: torch 2.13's own kernel takes 3.6 times as long for 64
# tokens, forward and backward, 1.8 times for 128, 1.2 for 256, and is faster for 1,024 (AMD EPYC with AVX512_BF16).
SHORT = 256


class KeyValueCache:
    """The keys and values that one attention layer has seen.

    Memory for `max_length` tokens is allocated at the first append, with the shape, type and device
    of what is appended (so that autocast needs no special care). Or it is given as `memory`
    (2,B,H,max_length,D), keys then values.
    """

    def __init__(self, max_length: int, memory: Tensor | None = None) -> None:
        self.max_length = max_length
        self.length = 0
        """Number of tokens so far, which is the position of the next one."""
        self._memory = memory

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add `k` and `v`, each (B,H,T,D), and return views of all keys and values so far, each (B,H,S,D).

        Raises ValueError if there is not enough memory.
        """
        batch, heads, tokens, head_dim = k.shape
        end = self.length + tokens
        if end > self.max_length:
            raise ValueError(f"{end} tokens do not fit a key-value cache of {self.max_length}; make it larger")
        if self._memory is None:
            self._memory = k.new_empty(2, batch, heads, self.max_length, head_dim)
        self._memory[0, :, :, self.length : end] = k
        self._memory[1, :, :, self.length : end] = v
        self.length = end
        return self.held()

    def held(self) -> tuple[Tensor, Tensor]:
        """Views of all keys and values so far, each (B,H,S,D)."""
        assert self._memory is not None, "nothing has been appended"
        return self._memory[0, :, :, : self.length], self._memory[1, :, :, : self.length]


class MultiheadAttention(nn.Module):
    """Self or cross attention; (B,T,E) in, (B,T,E) out.

    `bias`: whether the query, key and value projections have one; `out_bias`: the same for the
    output (None: as `bias`). `kdim` and `vdim`: widths of keys and values if they differ from
    `embed_dim`. `dropout`: its probability on the attention weights while training, with random
    numbers of torch's default generator.

    `num_kv_heads`: heads of keys and values, a divisor of `num_heads` (None: the same number);
    several heads of queries share one. `qk_norm`: each head of queries and keys is divided by its
    root mean square. `rotary`: in self-attention, queries and keys are turned by their positions
    (Su et al., 2021, arXiv 2104.09864), which go on after the tokens of the cache.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        out_bias: bool | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        rotary: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; change one of them")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}; change one of them"
            )
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.num_kv_heads, self.head_dim, self.qk_norm, self.rotary = (
            num_kv_heads,
            embed_dim // num_heads,
            qk_norm,
            rotary,
        )
        if rotary and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs, and a head is {self.head_dim} wide; make it even")
        kv_dim = num_kv_heads * self.head_dim
        self.rows = (embed_dim, kv_dim, kv_dim)
        """Rows of the query, key and value projections, in the order in which `in_proj_weight` has them."""
        kdim = embed_dim if kdim is None else kdim
        vdim = embed_dim if vdim is None else vdim
        if kdim == vdim == embed_dim:
            # One matrix, so that self-attention needs one matrix product.
            self.in_proj_weight = nn.Parameter(torch.empty(sum(self.rows), embed_dim))
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim))
            self.k_proj_weight = nn.Parameter(torch.empty(kv_dim, kdim))
            self.v_proj_weight = nn.Parameter(torch.empty(kv_dim, vdim))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.zeros(sum(self.rows)))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias if out_bias is None else out_bias)
        for name, parameter in self.named_parameters():  # the same initial values as in torch
            if "proj_weight" in name:
                nn.init.xavier_uniform_(parameter)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend from `query` (B,T,E) to `key` (B,S,kdim) and `value` (B,S,vdim); returns (B,T,E).

        No `key`, or `key is query`: self-attention. No `value`: the same as `key`. Masks as in
        torch: `key_padding_mask` bool (B,S), True is left out; `attn_mask` (T,S) or (B*H,T,S), bool
        with True for not allowed, or float to be added to the scores. `is_causal`: a query sees the
        keys up to its own position, the first query standing after what the cache holds.

        With a `cache`, self-attention appends its keys and values and sees all that are held (S
        counts them too); cross-attention fills an empty cache and from then on reads it, without
        projecting `key` and `value` again.
        """
        key = query if key is None else key
        value = key if value is None else value
        if self.rotary and key is not query:
            raise ValueError("rotary positions are those of one sequence: use them in self-attention only")
        past = 0
        if cache is None:
            q, k, v = self._project(query, key, value)
        elif key is query:
            past = cache.length
            q, k, v = self._project(query, key, value, past)
            k, v = cache.append(k, v)
        elif cache.length == 0:
            q, k, v = self._project(query, key, value)
            cache.append(k, v)
        else:
            q = self._normalized(self._split_heads(self._linear(query, 0)))
            k, v = cache.held()

        # --- one mask of all masks
        mask = attn_mask
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))  # BxHxTxS
        if key_padding_mask is not None:
            mask = _block(mask, key_padding_mask[:, None, None, :])
        is_causal = is_causal and past + 1 < k.size(2)  # else the first query, so every query, sees every key
        if is_causal and (mask is not None or past > 0):
            # SDPA takes no mask together with is_causal, and its is_causal counts queries from position 0.
            ahead = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(past + 1)
            mask, is_causal = _block(mask, ahead), False
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # for SDPA, True means allowed

        # --- attention
        dropout = self.dropout if self.training else 0.0
        grouped = self.num_kv_heads != self.num_heads
        kind = q.dtype  # autocast's, if there is one
        widen = kind == torch.bfloat16 and q.device.type == "cpu" and k.size(2) <= SHORT
        if widen:
            q, k, v = q.float(), k.float(), v.float()
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        with torch.autocast("cpu", enabled=False) if widen else contextlib.nullcontext():
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=grouped
            )
        return self.out_proj(y.to(kind).transpose(1, 2).flatten(2))

    def _project(self, query: Tensor, key: Tensor, value: Tensor, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value projections, (B,H,T,D) and (B,G,S,D), in as few matrix products as the inputs allow.

        `past` is the position of the first token.
        """
        if self.in_proj_weight is not None and key is value:
            if query is key:
                q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).split(self.rows, dim=-1)
            else:
                width = self.embed_dim
                bias = None if self.in_proj_bias is None else self.in_proj_bias[width:]
                q = self._linear(query, 0)
                k, v = F.linear(key, self.in_proj_weight[width:], bias).chunk(2, dim=-1)
        else:
            q, k, v = self._linear(query, 0), self._linear(key, 1), self._linear(value, 2)
        q, k = self._normalized(self._split_heads(q)), self._normalized(self._split_heads(k))
        if self.rotary:
            places = torch.arange(past, past + query.size(1), device=query.device)
            turned = rotation(places, self.head_dim)
            q, k = turn(q, *turned), turn(k, *turned)
        return q, k, self._split_heads(v)

    def _linear(self, x: Tensor, part: int) -> Tensor:
        """One projection alone; part 0 is query, 1 key, 2 value."""
        if self.in_proj_weight is None:
            weight = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[part]
        else:
            weight = self.in_proj_weight.split(self.rows)[part]
        return F.linear(x, weight, None if self.in_proj_bias is None else self.in_proj_bias.split(self.rows)[part])

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # BxTxE -> BxHxTxD, no copy

    def _normalized(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.head_dim,)) if self.qk_norm else x


def rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which pairs are turned at `positions`, (T) or (B,T): (T,D/2) or (B,1,T,D/2).

    The angle of pair i at position p is p / 10000^(2i/D), in float32 whatever the model computes in.
    """
    half = head_dim // 2
    speed = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions.float().unsqueeze(-1) * speed
    if angle.dim() == 3:
        angle = angle.unsqueeze(1)  # the same for all heads of a row
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B,H,T,D) with each pair (i, i + D/2) turned by what `rotation` gives."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def _block(mask: Tensor | None, blocked: Tensor) -> Tensor:
    """`mask` (bool with True for not allowed, or float to be added) with the positions in `blocked` not allowed either."""
    if mask is None:
        return blocked
    return mask | blocked if mask.dtype == torch.bool else mask.masked_fill(blocked, -math.inf)
