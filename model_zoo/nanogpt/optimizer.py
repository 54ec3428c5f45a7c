"""The optimizer of a run: AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix by the nearest matrix whose singular
values are all one to its mean gradient. What it moves by is scaled to the root mean square that AdamW's updates have (Liu et
al., 2025, arXiv 2502.16982), so one learning rate and one weight decay serve both.

torch has had `torch.optim.Muon` since 2.9, and the tests compare with it. It is not used because it cannot leave out an
update without waiting for the device, computes in bfloat16 on processors that have none, and one matrix at a time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elastic_gpt import devices
from model_zoo.nanogpt.config import OptimizerConfig
from model_zoo.nanogpt.model import GPT

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5: steep at zero, and near one from 0.7 to 1.2
ITERATIONS = 5
AS_ADAMW = 0.2  # root mean square of AdamW's updates, at a learning rate of one


def make_optimizer(model: GPT, settings: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the settings name, for all parameters of a model on `device`."""
    betas, fused = (settings.beta1, settings.beta2), devices.has_fused_adamw(device)
    groups, rate = model.decay_groups(settings.weight_decay), settings.learning_rate
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)
    matrices = dict(model.block_matrices())
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter not in matrices]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)
    kind = devices.usual_dtype(device)
    return Muon(matrices, adamw, momentum=settings.momentum, weight_decay=settings.weight_decay, dtype=kind)


class Muon(torch.optim.Optimizer):
    """Muon for some matrices, and within it an AdamW for other parameters.

    Like AdamW's fused kernel it obeys `found_inf`: where that is 1.0, an update leaves everything as it is, and nobody waits
    for the device to know.

    Args:
        matrices: parameters, and into how many rows each is cut: those of the matrices that lie in it one above the other.
        adamw: the optimizer of the others, whose groups and state become part of this one's.
        momentum: decay of the mean gradient.
        weight_decay: that of the matrices.
        dtype: type of the products in the iteration.
    """

    def __init__(
        self,
        matrices: Mapping[Tensor, Sequence[int]],
        adamw: torch.optim.AdamW,
        *,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        mine = {"params": list(matrices), "lr": adamw.defaults["lr"], "weight_decay": weight_decay}
        super().__init__([mine], {"momentum": momentum, "fused": adamw.defaults["fused"]})
        self.adamw, self.dtype = adamw, dtype
        self.rows = [list(rows) for rows in matrices.values()]
        # The dictionaries themselves, so that a rate set here is AdamW's.
        self.param_groups += adamw.param_groups
        self.state = adamw.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are those of the step, and are not computed anew"
        skip: Tensor | None = getattr(self, "found_inf", None)
        self.adamw.found_inf = skip  # type: ignore[attr-defined]
        self.adamw.step()
        group = self.param_groups[0]
        moved = []  # what each matrix would move by, before it is made orthogonal
        for parameter in group["params"]:
            assert parameter.grad is not None
            state: dict[str, Any] = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            mean = state["momentum"]
            # The mean of itself and itself is itself, so that nothing comes of a gradient that is not finite.
            gradient = parameter.grad if skip is None else torch.where(skip > 0, mean, parameter.grad)
            mean.lerp_(gradient, 1 - group["momentum"])
            moved.append(gradient.lerp(mean, group["momentum"]))  # Nesterov's form
        rate = group["lr"] if skip is None else group["lr"] * (1 - skip)
        decay = 1 - rate * group["weight_decay"]
        for parameter, update in zip(group["params"], self._orthogonal(moved), strict=True):
            parameter.mul_(decay).sub_(update.mul_(rate))

    def _orthogonal(self, moved: list[Tensor]) -> list[Tensor]:
        """Each made orthogonal, matrix by matrix, and scaled. Those of one shape go through the iteration together."""
        parts = [list(one.split(rows)) for one, rows in zip(moved, self.rows, strict=True)]
        places = defaultdict(list)
        for number, matrices in enumerate(parts):
            for part, matrix in enumerate(matrices):
                places[matrix.shape].append((number, part))
        for shape, where in places.items():
            together = torch.stack([parts[number][part] for number, part in where])
            scaled = orthogonal(together, self.dtype).float() * (AS_ADAMW * math.sqrt(max(shape)))
            for (number, part), matrix in zip(where, scaled, strict=True):
                parts[number][part] = matrix
        return [torch.cat(matrices) for matrices in parts]


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (N,A,B) with their singular values brought near one, in `dtype`; a matrix of zeros remains one."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.size(1) > x.size(2)
    if tall:  # products of the shorter side
        x = x.mT
    # No singular value is above this norm.
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
