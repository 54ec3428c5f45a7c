"""Trains some steps of a run again, in one process, and checks that the result is the same.

    elastic-gpt replay RUN --from 1000 --to 1200
    elastic-gpt replay RUN --verify

First the chain is checked: each checkpoint's files, the checkpoint that it says was before it, and the ledger up to it. That is
all that `--verify` does, and of any `Elastic` run.

Training begins at the checkpoint of the first step, in a folder of its own; RUN is only read. Each step's sequences are
compared, and its loss: equal in exact mode, else up to what the order of float sums may do. In exact mode, where there is a
checkpoint of the last step, so is every parameter and moment, byte for byte. That holds on the same kind of device, and on
CPUs with as many threads as the run's workers had (OMP_NUM_THREADS), and of a version that sums in the same way: of another
it is said, and the losses are compared as without exact mode.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from elastic_gpt import settings
from elastic_gpt.checkpoint import CheckpointError, Checkpoints, checkpoints_place
from elastic_gpt.contract import CHECKPOINTS, CONFIG, EXACT_SUMS, LEDGER, METRICS
from elastic_gpt.identity import Run
from elastic_gpt.ledger import Ledger, read_metrics
from elastic_gpt.reports import Observer, StepReport
from elastic_gpt.run import exits
from elastic_gpt.rundir import settings_before
from model_zoo.nanogpt.config import TrainConfig
from model_zoo.nanogpt.train import Training, check
from prepare.frontdoor import DONE, FAILED, Parser, command, whole

LOSS_TOLERANCE = 0.05  # nats, without exact mode; the same as in the drill
EXAMPLES = """\
examples:
  %(prog)s run                          from the oldest checkpoint there is to the newest
  %(prog)s run --from 1000 --to 1200    from that checkpoint, 200 steps
  %(prog)s run --verify                 only check that nothing was damaged or exchanged"""


class Kept(Observer):
    """An observer that keeps each step's sequences and loss."""

    def __init__(self) -> None:
        self.steps: dict[int, tuple[str, float | None]] = {}

    def on_step(self, report: StepReport) -> None:
        self.steps[report.step] = report.sequence_hash, report.loss


@command
def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt replay") -> int:
    """Returns exit code 0 if it is the same, 1 if not, 2 for a user's mistake."""
    parser = Parser(prog, description="Train a stretch of a run again, and compare.", epilog=EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory; it is only read")
    parser.add_argument(
        "--from", dest="first", type=whole(1), metavar="STEP", help="a checkpoint's (default: the oldest)"
    )
    parser.add_argument("--to", dest="last", type=whole(1), metavar="STEP", help="(default: the newest checkpoint's)")
    parser.add_argument(
        "--verify", action="store_true", help="check the chain of checkpoints and ledger, train nothing"
    )
    args = parser.parse_args(argv)
    before = settings_before(args.run / CONFIG)
    if not before:
        raise ValueError(f"{args.run} is no run directory: name one that `elastic-gpt train` has written")
    place = checkpoints_place(args.run, before.get("checkpoint.dir"))
    checkpoints = Checkpoints(place, run=_history(Ledger(args.run)), ledger=args.run / LEDGER)
    steps = checkpoints.steps()
    if args.verify:
        for gap in checkpoints.check_chain():
            print(f"not checked: {gap}")
        print(f"in order: {len(steps)} checkpoints in {checkpoints.storage}, and the ledger up to the last of them")
        return DONE
    first, last = args.first or min(steps, default=0), args.last or max(steps, default=0)
    if first not in steps:
        raise ValueError(f"there is no checkpoint of step {first}: {_those(steps)}")
    done = {line["step"]: (line["sequence_hash"], line["loss"]) for line in read_metrics(args.run)}
    if not first < last or last not in done:
        raise ValueError(f"from step {first} there is no step {last} to come to: take one up to {max(done, default=0)}")
    checkpoints.check_chain()
    before = _settings_then(Ledger(args.run).events(), before, first, last)
    exact = bool(before["elastic.exact"])
    other_sums = exact and checkpoints.exact_sums(first) != EXACT_SUMS
    exact = exact and not other_sums
    with tempfile.TemporaryDirectory(prefix="elastic-gpt-replay-") as folder:
        tensors, again = _train_again(args.run, Path(folder), before, checkpoints, first, last)
    differences = _differences(done, again, first, last, exact)
    compared = "sequences and losses"
    if exact and last in steps:
        compared += ", parameters and moments"
        differences += _different_tensors(tensors, checkpoints, last)
    if other_sums:
        print(
            f"not compared bit for bit: the version that saved the checkpoint of step {first} sums gradients in another way"
        )
    for line in differences[:10]:
        print(f"NOT the same: {line}")
    if differences:
        return FAILED
    print(
        f"the same: {last - first} steps from {first} to {last}, {compared}, {'bit for bit' if exact else 'up to float sums'}"
    )
    return DONE


def _history(ledger: Ledger) -> Run | None:
    """What tells checkpoints of ends that the run went back from; None where there is no ledger."""
    names = {event["name"]: event["life"] for event in ledger.events() if event.get("name")}
    known = ledger.identities()
    return Run(known[-1]["run_id"], ledger.lives(), ledger.branches(), lives=names) if known else None


def _settings_then(events: list[dict[str, Any]], now: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The settings with which the run trained from step `first` to `last`; it may have been given others since.

    Raises ValueError if they changed in between.
    """
    starts, changes = [], list[dict[str, list[Any]]]()  # of each life the step at which it began, and what it changed
    new: dict[str, list[Any]] = {}
    for event in events:
        if event["event"] == "settings_changed":
            new |= event["changes"]
        elif event["event"] == "restored":
            starts.append(event["step"])
            changes.append(new)
            new = {}
    # A step is of the last life that began before it: what earlier ones did there is not kept.
    lives = [max(life for life, start in enumerate(starts) if start < step) for step in (first + 1, last)]
    for life in range(lives[0] + 1, lives[1] + 1):
        decides = [name for name in changes[life] if name == "steps" or name.startswith("optimizer.")]
        if decides:
            (old, value), start = changes[life][decides[0]], starts[life]
            raise ValueError(
                f"{decides[0]} became {value} at step {start}, before it was {old}: take --to {start}, or --from a later step"
            )
    then = dict(now)
    for changed in reversed([*changes[lives[1] + 1 :], new]):
        then |= {name: old for name, (old, _) in changed.items()}
    return then


def _those(steps: list[int]) -> str:
    return f"take one of {', '.join(map(str, steps))}" if steps else "this run has saved none yet"


def _train_again(
    run: Path, folder: Path, before: dict[str, Any], checkpoints: Checkpoints, first: int, last: int
) -> tuple[dict[str, torch.Tensor], dict[int, tuple[str, float | None]]]:
    """Train steps `first` to `last` again. Returns the state after `last`, and sequence hash and loss of each step."""
    copy, preset = folder / "run", folder / "preset.yaml"
    for name in (CONFIG, METRICS, LEDGER):
        copy.mkdir(exist_ok=True)
        shutil.copyfile(run / name, copy / name)
    checkpoints.copy(first, copy / CHECKPOINTS)
    known = settings.field_types(TrainConfig).keys() - {"run_dir", "checkpoint.dir"}
    preset.write_text(yaml.safe_dump(_nested({name: before[name] for name in known & before.keys()})))
    quiet = ["--evaluate.interval=0", "--observe.tensorboard=false", f"--checkpoint.interval={last + 1}"]
    quiet += [f"--elastic.snapshot-interval={last + 1}", f"--observe.interval={max(1, (last - first) // 10)}"]
    config, meta = check([str(preset), f"--run-dir={copy}", *quiet], "elastic-gpt replay")
    kept = Kept()
    with exits(copy):
        training = Training(config, meta)
        training.observers = [kept]
        for step in training:
            for tokens, targets in step:
                step.backward(training.loss_sum(tokens, targets))
            step.update(config.optimizer.rate(step.number, config.steps))
            if step.number + 1 == last:
                break
        training.report_last(step)
    if training.snapshots:
        training.snapshots.discard()
    restored = [event for event in Ledger(copy).events() if event["event"] == "restored"][-1]
    if restored["step"] != first:
        raise CheckpointError(f"the checkpoint of step {first} could not be taken: {restored['source']} was")
    return training.tensors, kept.steps


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return tree


def _differences(done: dict[int, Any], again: dict[int, Any], first: int, last: int, exact: bool) -> list[str]:
    found = []
    for step in range(first + 1, last + 1):
        (ids, loss), (ids_again, loss_again) = done[step], again[step]
        if ids != ids_again:
            found.append(f"step {step} was of other sequences")
        near = loss == loss_again or (None not in (loss, loss_again) and abs(loss - loss_again) <= LOSS_TOLERANCE)
        if loss != loss_again if exact else not near:
            found.append(f"step {step} had loss {loss}, and has {loss_again}")
    return found


def _different_tensors(tensors: dict[str, torch.Tensor], checkpoints: Checkpoints, step: int) -> list[str]:
    saved = checkpoints.read(step, "model") | checkpoints.read(step, "optimizer")
    found = [] if saved.keys() == tensors.keys() else ["the checkpoint holds other tensors"]
    for name in saved.keys() & tensors.keys():
        if not torch.equal(saved[name], tensors[name].cpu()):
            found.append(f"{name} differs, by up to {(saved[name] - tensors[name].cpu()).abs().max():.3g}")
    return found
