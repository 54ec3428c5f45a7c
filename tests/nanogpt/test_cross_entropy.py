"""cross_entropy.py: the loss and gradients of bfloat16 logits, whatever the chunks; what is large or small is no trouble."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.nanogpt import cross_entropy
from model_zoo.nanogpt.cross_entropy import linear_cross_entropy
from model_zoo.nanogpt.model import GPT, GPTConfig


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """All logits at once, in float32."""
    return F.cross_entropy(F.linear(x, weight, bias), targets, reduction="sum")


def grads(loss: Tensor, *of: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [tensor for tensor in of if tensor is not None]))


@pytest.mark.parametrize("tokens", [1, 7, 16, 19])
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    tokens: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)
    torch.manual_seed(1)
    x, weight = torch.randn(tokens, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    bias = torch.randn(50, requires_grad=True) if biased else None
    targets = torch.randint(50, (tokens,))
    ours, theirs = linear_cross_entropy(x, weight, bias, targets), plain(x, weight, bias, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # bfloat16 has three digits
    for mine, other in zip(
        grads(3 * ours, x, weight, bias), grads(3 * theirs, x, weight, bias), strict=True
    ):  # scaled, too
        assert mine.dtype == torch.float32
        assert (mine - other).norm() < 0.02 * other.norm()


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
