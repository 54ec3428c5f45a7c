"""Any number of micro-batches on any number of ranks, and the one true mean gradient of the global batch (law 3).

All gradients live in one flat buffer, and each parameter's `.grad` is a view of it. A step is: `zero`, one `backward` for
each micro-batch of this rank's share, then `reduce`. A rank may have no micro-batch at all, and nothing is rebuilt when the
world changes. Each loss is divided by the tokens of the *global* batch before its backward pass, so the sum over all ranks
is the mean over all tokens, however unevenly the micro-batches are shared out.

The sum over the ranks is made in pieces of the buffer, from its end to its beginning, while the backward pass of the last
micro-batch goes on: a thread sends one piece after the other as soon as all gradients in it are there. The order is that of
the buffer, on every rank the same, whatever order gradients come in.

What the ranks must agree on in the same step anyway travels behind the last piece: the loss of each micro-batch and the ids
of its sequences, in slots of their own, the time that each took, and how many workers were asked to stop, and of these how
many leave for good.
"""

import contextlib
import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from elastic_gpt.exact import BLOCK, ExactSum
from elastic_gpt.order import share
from elastic_gpt.settings import Traffic
from elastic_gpt.world import PeerLost, World

HALF = 24  # bits of a sequence id in one slot: whole numbers up to 2**24 are exact in float32
PIECE = 1 << 18  # gradients that are sent together: 1 MB, which a link of 100 Mbit/s carries in 0.1 s


@dataclass(frozen=True)
class StepSums:
    """What all ranks know after `reduce`, the same on each."""

    loss: torch.Tensor
    """Mean cross-entropy of the global batch, a scalar on the device (reading it waits for the device)."""
    ids: torch.Tensor
    """Ids of the sequences in the gradient, in order: upper and lower `HALF` bits, (2, global batch) on the device."""
    stops: torch.Tensor
    """How many workers were asked to stop, and how many of them leave for good; (2,) on the device."""
    seconds: torch.Tensor
    """The time that each micro-batch took (pace.py), (micro-batches,) on the device."""


class Gradients:
    """The gradient buffer of a model.

    Args:
        parameters: those that are trained; their `.grad` become views of the buffer.
        micro_batches: number of micro-batches in a global batch.
        global_batch: sequences in a step.
        tokens: number of targets in a global batch, over all ranks.
        exact: sum in whole numbers, so that the result is the same bit for bit at every world size (law 4).
        traffic: type in which gradients travel; bfloat16 is half the bytes, and rounds. Not in exact mode.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        world: World,
        *,
        micro_batches: int,
        global_batch: int,
        tokens: int,
        exact: bool,
        traffic: Traffic = "float32",
    ) -> None:
        assert not (exact and traffic == "bfloat16"), "a rounded sum is not exact"
        self.parameters = list(parameters)
        self.world = world
        self.tokens = tokens
        self.traffic = traffic
        *starts, size = itertools.accumulate((parameter.numel() for parameter in self.parameters), initial=0)
        # A backward pass comes to the last parameters first. The last piece is at the beginning, and may be shorter.
        borders = [*range(size, 0, -PIECE), 0]
        self.pieces = [slice(start, end) for end, start in itertools.pairwise(borders)]
        # What the ranks agree on is a tensor of its own: it is always exact, and sent last.
        self._agreed_sizes = [micro_batches, 2 * global_batch, 2, micro_batches, -(-size // BLOCK) if exact else 0]
        self._starts = [*starts, size]
        self._missing = len(self.parameters)  # all gradients of parameters from this one on are there
        self._came: set[int] = set()  # others, which came out of order
        self._sender = Sender()
        self._sent = 0  # pieces
        self.exact: ExactSum | None = None
        self._allocate(exact)

    def _allocate(self, exact: bool) -> None:
        device, size = self.world.device, self._starts[-1]
        self.agreed = torch.zeros(sum(self._agreed_sizes), dtype=torch.float32, device=device)
        self.losses, ids, self.stops, self.seconds, blocks = self.agreed.split(self._agreed_sizes)
        self.ids = ids.view(2, len(self.losses), -1)
        self.gradient = torch.zeros(size, dtype=torch.float32, device=device)
        for start, parameter in zip(self._starts[:-1], self.parameters, strict=True):
            parameter.grad = self.gradient[start : start + parameter.numel()].view_as(parameter)
        if exact:
            self.exact = ExactSum(self.gradient, blocks, len(self.losses))

    def zero(self) -> None:
        """Begin a step."""
        self.gradient.zero_()
        self.agreed.zero_()
        if self.exact:
            self.exact.zero()
        self._sent = 0

    def backward(
        self, micro_batch: int, ids: torch.Tensor, loss_sum: torch.Tensor, scale: torch.Tensor | float = 1.0
    ) -> None:
        """Add the gradient of one micro-batch, or of some that went through the model together (not in exact mode).

        With the last one of this rank's share the sum over the ranks begins.

        Args:
            micro_batch: its index in the global batch; of several, the first one's, whose slot gets the loss of all.
            ids: ids of its sequences, int64 (B,).
            loss_sum: sum of the cross-entropy over its targets, a scalar.
            scale: the factor by which a float16 run multiplies its losses.
        """
        if self._sent:
            raise RuntimeError(f"micro-batch {micro_batch} comes after the last one of this rank's share")
        mean = loss_sum / self.tokens
        merged = max(1, len(ids) // self.ids.size(2))
        last = micro_batch + merged == share(len(self.losses), self.world.rank, self.world.size).stop
        with self._sending() if last and self.world.size > 1 else contextlib.nullcontext():
            (mean * scale).backward()
        self.losses[micro_batch] = mean.detach()
        halves = torch.stack((ids >> HALF, ids & ((1 << HALF) - 1)))
        self.ids[:, micro_batch : micro_batch + merged] = halves.view(2, merged, -1)
        if self.exact and not last:
            self.exact.count()

    def reduce(self, stop: bool, leave: bool) -> StepSums:
        """Sum over all ranks. Afterwards every `.grad` is the mean gradient over the global batch's tokens.

        Args:
            stop: whether this worker was asked to stop after this step.
            leave: whether it then leaves for good.

        Raises:
            PeerLost: if a peer died; the step is then dropped whole. Nothing is on its way any more.
        """
        # With fill_, the number goes along as an argument; by assignment a GPU would copy it, and the host wait.
        self.stops[0].fill_(float(stop))
        self.stops[1].fill_(float(leave))
        if self.world.size > 1:
            self._send_from(0)
            # Slots that one rank fills and the others leave zero are exact in any order as they are.
            self._sender.send(functools.partial(self.world.sum, self.agreed))
            # A GPU's sums are only queued: nothing of the state may be touched before the host has seen them end.
            self._sender.send(self.world.settle)
            if self.exact:
                self._sender.send(functools.partial(self.exact.settle, self.world))
            try:
                self._sender.wait()
            except PeerLost as lost:
                if lost.given_up:  # what comes late is written where nobody looks any more
                    self._allocate(self.exact is not None)
                raise
        elif self.exact:
            self.exact.alone()
        # One slot per micro-batch, added up in the same order everywhere: the loss does not depend on the world either.
        return StepSums(self.losses.sum(), self.ids.flatten(1).clone(), self.stops.clone(), self.seconds.clone())

    # --- the sum over the ranks, piece by piece

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        """Within it, each piece is sent as soon as its gradients are there."""
        trained = [number for number, parameter in enumerate(self.parameters) if parameter.requires_grad]
        self._missing = len(self.parameters)
        self._came = set(range(self._missing)).difference(trained)  # nothing comes of those that are frozen
        hooks = [
            self.parameters[number].register_post_accumulate_grad_hook(functools.partial(self._comes, number))
            for number in trained
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _comes(self, number: int, parameter: torch.Tensor) -> None:
        """The gradient of a parameter is there."""
        if self._sent and self._starts[number + 1] > self.pieces[self._sent - 1].start:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} got a second gradient in one backward pass, when the"
                " first was sent: torch.utils.checkpoint needs use_reentrant=False"
            )
        self._came.add(number)
        while self._missing - 1 in self._came:
            self._missing -= 1
        self._send_from(self._starts[self._missing])

    def _send_from(self, start: int) -> None:
        """Send the pieces from the buffer's end to `start`, unless they were."""
        while self._sent < len(self.pieces) and self.pieces[self._sent].start >= start:
            piece = self.pieces[self._sent]
            if self.exact:
                self.exact.close(piece)
            self._sent += 1
            self._sender.send(functools.partial(self._sum, piece))

    def _sum(self, piece: slice) -> None:
        """Sum a piece over the ranks, in the sender's thread."""
        values = self.gradient[piece]
        if self.traffic == "float32":
            self.world.sum(self.exact.numbers[piece] if self.exact else values)
            return
        # Each rank adds up one part, with more digits than travel, and gives the sum to all.
        size = self.world.size
        parts = values.new_zeros((size, -(-len(values) // size)), dtype=torch.bfloat16)
        parts.view(-1)[: len(values)].copy_(values)
        mine = self.world.exchange(parts).sum(0, dtype=torch.float32).to(torch.bfloat16)
        values.copy_(self.world.exchange(mine.repeat(size, 1)).view(-1)[: len(values)])

    def clip(self, limit: float) -> torch.Tensor:
        """Scale the gradient down to the norm `limit` (0: no limit). Returns its norm before, a scalar on the device."""
        norm = torch.linalg.vector_norm(self.gradient)
        if limit > 0:
            self.gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


class Sender:
    """A thread that works off what it is given, one after the other, until something fails: the rest is then dropped.

    So the order of collectives is that in which they were given, and after a failed one nothing is on its way.
    """

    def __init__(self) -> None:
        self._given: queue.SimpleQueue[Callable[[], None] | threading.Event] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None

    def send(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            # A daemon: a process that ends by an error in the middle of a step does not wait for its peers.
            self._thread = threading.Thread(target=self._work, name="gradients", daemon=True)
            self._thread.start()
        self._given.put(work)

    def wait(self) -> None:
        """Until all is done, or dropped. Raises what the first failure was."""
        done = threading.Event()
        self._given.put(done)
        done.wait()
        failed, self._failed = self._failed, None
        if failed:
            raise failed

    def _work(self) -> None:
        while True:
            work = self._given.get()
            if isinstance(work, threading.Event):
                work.set()
            elif self._failed is None:
                try:
                    work()
                except BaseException as error:
                    self._failed = error


def not_finite(sums: StepSums, norm: torch.Tensor) -> torch.Tensor:
    """1.0 if the loss or the gradient's norm is NaN or infinite, else 0.0: a scalar on the device, the same on every rank."""
    return 1.0 - (sums.loss.isfinite() & norm.isfinite()).float()


def update(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """Do one update. If `skip` (see `not_finite`) is 1.0, leave parameters, moments and the optimizer's step as they are."""
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # as torch.amp.GradScaler does: nobody waits for the device
        optimizer.step()
    elif not bool(skip):
        optimizer.step()


class LossScale:
    """The factor that keeps float16 gradients from vanishing: halved after an overflow, doubled after 2,000 good steps.

    It is part of the training state, so a restored run goes on with the same factor.
    """

    def __init__(self, device: torch.device) -> None:
        self.state = torch.tensor([2.0**16, 0.0], device=device)  # the factor, and good steps since it last changed

    @property
    def factor(self) -> torch.Tensor:
        return self.state[0].clone()

    def unscale(self, gradient: torch.Tensor) -> None:
        """Divide the reduced gradient by the factor. If it overflowed it stays infinite, and the update is left out.

        What becomes of the factor is decided on the device: nobody waits for it.
        """
        factor, good = self.state.unbind()
        gradient.div_(factor)
        finite = torch.isfinite(gradient).all()
        good = torch.where(finite, good + 1, 0.0)
        grows = good >= 2000
        factor = torch.where(finite, torch.where(grows, 2 * factor, factor), 0.5 * factor)
        self.state.copy_(torch.stack((factor, torch.where(grows, 0.0, good))))
