"""cross_entropy.py: the loss and gradients of bfloat16 logits, whatever the chunks; what is large or small is no trouble.

A GPU's way (another chunk, a vocabulary that is filled up) is taken on the CPU here.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_zoo.nanogpt import cross_entropy
from model_zoo.nanogpt.cross_entropy import linear_cross_entropy
from model_zoo.nanogpt.model import GPT, GPTConfig


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """All logits at once, in float32."""
    return F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")


def grads(loss: Tensor, *of: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [tensor for tensor in of if tensor is not None]))


@pytest.fixture
def gpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("cross_entropy", "model"):
        monkeypatch.setattr(f"model_zoo.nanogpt.{room}.on_host", lambda _: False)
    monkeypatch.setattr(cross_entropy, "LOGITS", 8 * 64)  # 8 tokens


@pytest.fixture
def a_cpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)


def compiled(function: Callable[..., Tensor], see: Callable[[torch.fx.GraphModule], None]) -> Callable[..., Tensor]:
    """`function` as torch.compile sees it, in one graph forward and one backward, without generating code."""

    def look(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        see(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def nothing(_graph: torch.fx.GraphModule) -> None:
    pass


CASES = [
    *itertools.product(["a_cpus_way", "gpus_way"], [1, 7, 16, 19], [50, 64, 65], [False, True]),
    *itertools.product(["gpus_way, compiled"], [19], [64, 65], [False, True]),  # a second each
]


@pytest.mark.parametrize(("way", "tokens", "vocabulary", "biased"), CASES)
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    way: str, tokens: int, vocabulary: int, biased: bool, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(way.split(",")[0])
    torch.manual_seed(1)
    x, weight = torch.randn(tokens, 32, requires_grad=True), torch.randn(vocabulary, 32, requires_grad=True)
    bias = torch.randn(vocabulary, requires_grad=True) if biased else None
    targets = torch.randint(vocabulary, (tokens,))
    function = compiled(linear_cross_entropy, nothing) if "compiled" in way else linear_cross_entropy
    ours, theirs = function(x, weight, bias, targets), plain(x, weight, bias, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # bfloat16 has three digits
    for mine, other in zip(
        grads(3 * ours, x, weight, bias), grads(3 * theirs, x, weight, bias), strict=True
    ):  # scaled, too
        assert (mine.dtype, mine.shape) == (torch.float32, other.shape)
        assert (mine - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("of_all", [cross_entropy._in_place, cross_entropy._traced])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_that_fill_the_vocabulary_up_take_no_probability_and_have_no_gradient(of_all: Any, biased: bool) -> None:
    torch.manual_seed(1)
    x, w, bias = (
        torch.randn(19, 32).bfloat16(),
        0.01 * torch.randn(65, 32).bfloat16(),
        torch.randn(65) if biased else None,
    )
    targets = torch.randint(65, (19,))
    filled = torch.cat((w, torch.zeros(128 - 65, 32, dtype=w.dtype)))
    loss, gradients = of_all(x, w, bias, targets, 8, 65, True)
    same, equal = of_all(x, filled, bias, targets, 8, 65, True)
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=0)
    assert len(gradients) == len(equal) == 2 + biased
    for mine, other in zip(equal, gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)  # of bfloat16


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made within it."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("vocabulary", [256, 257])
def test_all_logits_never_exist_at_once(
    gpus_way: None,  # noqa: ARG001
    vocabulary: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, limit = 100, 16 * 320
    monkeypatch.setattr(cross_entropy, "LOGITS", limit)
    x, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with Largest() as eager:
        linear_cross_entropy(x, weight, None, targets).backward()
    assert limit // 2 < eager.elements <= limit < tokens * vocabulary // 4

    sizes: list[list[int]] = []  # of each graph, forward and backward

    def see(graph: torch.fx.GraphModule) -> None:
        made = [tree_leaves(node.meta.get("val")) for node in graph.graph.nodes]
        sizes.append([one.numel() for leaves in made for one in leaves if isinstance(one, Tensor)])

    compiled(linear_cross_entropy, see)(x, weight, None, targets).backward()
    forward, backward = sizes
    assert limit // 2 < max(forward) <= limit
    assert max(backward) <= vocabulary * 4  # no logits are kept for it


def test_a_gpus_chunks_are_of_one_size_and_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(cross_entropy, "on_host", lambda _: False)
    monkeypatch.setattr(cross_entropy._LinearCrossEntropy, "apply", lambda *of: given.append(of[4:6]))
    for tokens, vocabulary in ((12 * 1024, 50257), (12 * 1024, 65), (1, 50257)):
        with torch.device("meta"):
            x, weight = torch.empty(tokens, 8), torch.empty(vocabulary, 8)
        linear_cross_entropy(x, weight, None, torch.empty(tokens, dtype=torch.int64, device="meta"))
    assert given == [(4096, 50304), (12288, 128), (1, 50304)]


def test_a_target_that_is_all_but_impossible_has_a_finite_loss() -> None:
    x, weight = torch.ones(1, 1), torch.tensor([[0.0], [512.0]])
    assert linear_cross_entropy(x, weight, None, torch.tensor([0])) == 512
    assert linear_cross_entropy(x, weight, None, torch.tensor([1])) == 0


def test_what_is_not_finite_stays_so() -> None:
    x, weight = torch.tensor([[float("nan")]]), torch.ones(4, 1)
    assert linear_cross_entropy(x, weight, None, torch.tensor([0])).isnan()


def test_an_evaluation_makes_no_gradients() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, None, torch.tensor([0, 1, 2]))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, None, torch.tensor([0, 1, 2])).detach())


def test_a_model_on_a_gpu_is_one_graph_and_has_the_same_gradients(gpus_way: None) -> None:  # noqa: ARG001
    torch.manual_seed(1)
    model = GPT(GPTConfig(65, 8, n_layer=1, n_head=2, n_embd=16))
    tokens, found = torch.randint(65, (2, 8)), []
    for forward in (model, compiled(model, nothing)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(tokens, tokens)
        loss.backward()
        found.append(torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters())]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found.append(compiled(model, nothing)(tokens, tokens).view(1))
    model.zero_grad()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    truth = torch.cat([p.grad.flatten() for p in model.parameters()])
    for ours in found[:2]:
        assert (ours[1:] - truth).norm() < 0.02 * truth.norm()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[0][0], found[2][0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("head_bias", [False, True])
def test_a_model_with_a_large_vocabulary_uses_it_under_autocast(
    head_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = GPT(GPTConfig(8192, 8, n_layer=1, n_head=2, n_embd=16, head_bias=head_bias))
    tokens = torch.randint(8192, (2, 8))

    def gradients() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, tokens)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, ours = gradients()
    monkeypatch.setattr("model_zoo.nanogpt.model.linear_cross_entropy", plain)
    other_loss, others = gradients()
    torch.testing.assert_close(loss, other_loss, rtol=1e-3, atol=0)
    assert not torch.equal(ours, others)
    assert (ours - others).norm() < 0.02 * others.norm()
