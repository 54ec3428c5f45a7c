"""optimizer.py: Muon is torch's, leaves out what is not finite without waiting, and its runs are as elastic as AdamW's."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_gpt.gradients import update
from elastic_gpt.state import training_state
from elastic_gpt.testing import assert_elastic
from model_zoo.nanogpt.config import OptimizerConfig
from model_zoo.nanogpt.model import GPT, GPTConfig
from model_zoo.nanogpt.optimizer import Muon, make_optimizer, orthogonal
from tests.conftest import TINY, assert_same_run, elastic_gpt, events
from tests.elastic.test_run import linux

CPU = torch.device("cpu")
SETTINGS = OptimizerConfig(kind="muon", learning_rate=1e-2)


def tiny(**more: Any) -> GPT:
    torch.manual_seed(3)
    return GPT(GPTConfig(**{"vocab_size": 23, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, **more}))


def with_gradients(model: GPT, seed: int = 0, value: float | None = None) -> GPT:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if value is None else torch.full_like(parameter, value)
    return model


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_moves_matrices_as_torchs_does_and_the_rest_as_adamw(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    shapes = [(16, 16), (48, 16), (16, 64), (16, 16)]
    mine, theirs = ([torch.nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in range(2))
    other = [torch.nn.Parameter(torch.randn(7)) for _ in range(2)]
    for copies in ([*theirs, other[1]], [*mine, other[0]]):
        torch.manual_seed(2)
        for parameter in copies:
            parameter.data.normal_()
    adamw = [torch.optim.AdamW([one], lr=1e-2, fused=True) for one in other]
    rows = {parameter: (parameter.size(0),) for parameter in mine}
    muon = Muon(rows, adamw[0], momentum=0.9, weight_decay=0.1, dtype=dtype)
    torchs = torch.optim.Muon(theirs, lr=1e-2, momentum=0.9, weight_decay=0.1, eps=1e-7, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for one, another in zip([*mine, other[0]], [*theirs, other[1]], strict=True):
            one.grad = torch.randn_like(one)
            another.grad = one.grad.clone()
        for optimizer in (muon, torchs, adamw[1]):
            optimizer.step()
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-2, "atol": 2e-3}
    torch.testing.assert_close(mine, theirs, **near)
    torch.testing.assert_close(other[0], other[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    "more", [{}, {"tied_head": False, "positions": "rotary", "activation": "swiglu", "n_kv_head": 1}]
)
def test_the_matrices_of_the_blocks_are_muons_and_each_parameter_is_somebodys(more: dict[str, Any]) -> None:
    model = tiny(**more)
    optimizer = make_optimizer(model, SETTINGS, CPU)
    groups = [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    everybody = [one for group in groups for one in group]
    assert sorted(everybody) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {name for name, one in model.named_parameters() if name.startswith("h.") and one.dim() == 2}
    assert {names[one] for one in groups[0]} == matrices
    assert all(sum(rows) == parameter.size(0) for parameter, rows in model.block_matrices())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    for group in optimizer.param_groups:  # as a step of the run does
        group["lr"] = 0.0
    before = [parameter.clone() for parameter in model.parameters()]
    with_gradients(model)
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_queries_keys_and_values_are_made_orthogonal_each_alone() -> None:
    model = with_gradients(tiny())
    optimizer = make_optimizer(model, SETTINGS, CPU)
    weight = model.h[1].attn.in_proj_weight
    before = weight.detach().clone()
    optimizer.step()
    moved = before * (1 - 1e-2 * 0.1) - weight.detach()
    for part, gradient in zip(moved.split(16), weight.grad.split(16), strict=True):
        expected = orthogonal(gradient.unsqueeze(0), torch.float32)[0]
        torch.testing.assert_close(part / (1e-2 * 0.2 * 4), expected, rtol=1e-3, atol=1e-4)


def test_the_state_is_named_parameter_by_parameter_and_making_it_changes_nothing() -> None:
    model = with_gradients(tiny(), value=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = training_state(model, make_optimizer(model, SETTINGS, CPU))
    assert all(torch.equal(tensors[f"model.{name}"], tensor) for name, tensor in before.items())
    moments = {name.removeprefix("optimizer.") for name in tensors if name.startswith("optimizer.")}
    matrices = {f"h.{i}.{name}" for i in (0, 1) for name in
                ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")}  # fmt: skip
    rest = set(dict(model.named_parameters())) - matrices
    assert moments == {f"momentum.{name}" for name in matrices} | {
        f"{moment}.{name}" for moment in ("step", "exp_avg", "exp_avg_sq") for name in rest
    }
    assert all(not tensor.any() for name, tensor in tensors.items() if name.startswith("optimizer."))


class NobodyWaits(TorchDispatchMode):
    """Fails where a number of a tensor is asked for, which on a GPU waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_skipped_update_leaves_everything_as_it_is_and_nobody_waits_to_know(value: float) -> None:
    models = [tiny(), tiny()]
    optimizers = [make_optimizer(model, SETTINGS, CPU) for model in models]
    states = [training_state(with_gradients(one, value=0.0), two) for one, two in zip(models, optimizers, strict=True)]

    def step(number: int, seed: int, skip: float, value: float | None = None) -> None:
        with_gradients(models[number], seed, value)
        with NobodyWaits():
            update(optimizers[number], torch.tensor(skip))

    for number in (0, 1):
        step(number, 1, skip=0.0)
    step(0, 2, skip=1.0, value=value)
    for number in (0, 1):
        step(number, 3, skip=0.0)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_matrices_of_zeros_stay_zeros_and_tall_ones_are_wide_ones_turned() -> None:
    matrices = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1))
    matrices[1] = 0.0
    wide = orthogonal(matrices, torch.float32)
    assert not wide[1].any()
    torch.testing.assert_close(orthogonal(matrices.mT, torch.float32).mT, wide)


# --- runs


SCRIPT = """
import sys
import torch
from elastic_gpt import Elastic
from model_zoo.nanogpt.config import OptimizerConfig
from model_zoo.nanogpt.model import GPT, GPTConfig
from model_zoo.nanogpt.optimizer import make_optimizer

torch.manual_seed(1)
torch.set_num_threads(1)
model = GPT(GPTConfig(vocab_size=23, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.1))
tokens = torch.randint(23, (400, 9))
data = torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:])
optimizer = make_optimizer(model, OptimizerConfig(kind="muon", learning_rate=1e-2), torch.device("cpu"))
plan = {"steps": 10, "global_batch": 16, "micro_batch": 2, "targets": 8, "exact": True, "device": "cpu"}
run = Elastic(sys.argv[1], model, optimizer, data, **plan)
for step in run:
    for inputs, targets in step:
        step.backward(model(inputs, targets))
    step.update()
"""


@linux
def test_a_run_with_muon_is_the_same_bit_for_bit_whoever_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "muon.py"
    script.write_text(SCRIPT)
    assert_elastic(script, lambda run: [run], tmp_path, sizes=(2,))


def test_a_run_with_muon_resumes_is_replayed_and_keeps_its_optimizer(data: Path, tmp_path: Path) -> None:
    def train(run: Path, *more: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        kind = ["--optimizer.kind=muon", f"--data.dir={data}", f"--run-dir={run}", "--checkpoint.interval=10"]
        return elastic_gpt("train", "debug_cpu", *TINY, *kind, *more, code=code)

    train(tmp_path / "undisturbed", "--steps=30", "--optimizer.decay-steps=30")
    run = tmp_path / "run"
    train(run, "--steps=20", "--optimizer.decay-steps=30")
    train(run, "--steps=30", "--optimizer.decay-steps=30")
    assert_same_run(run, tmp_path / "undisturbed")
    assert events(run, "restored")[1]["source"] == "checkpoint step_00000020"
    assert "bit for bit" in elastic_gpt("replay", run, "--from=20", "--to=30").stdout
    done = train(run, "--steps=40", "--optimizer.kind=adamw", code=2)
    assert "has optimizer.kind=muon, not adamw: set it back, or train into another --run-dir" in done.stderr
