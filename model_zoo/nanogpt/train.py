"""Train a GPT, elastically: alone, or as one worker of many that may come and go.

    elastic-gpt train shakespeare_char --data.dir data --run-dir run
    python model_zoo/nanogpt/train.py shakespeare_char --data.dir data --run-dir run
    torchrun --nproc-per-node 2 model_zoo/nanogpt/train.py shakespeare_char --data.dir data --run-dir run
    elastic-gpt launch --nodes 3 -- train shakespeare_char --data.dir data --run-dir run

The same command resumes a run that was interrupted: nothing but the run directory is needed.
"""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a script: its folder is on the path, where the project's should be
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from elastic_gpt import settings
from elastic_gpt.batches import Batches
from elastic_gpt.checkpoint import CheckpointError, Checkpoints
from elastic_gpt.evaluator import Evaluator
from elastic_gpt.gradients import Gradients, LossScale
from elastic_gpt.ledger import Ledger
from elastic_gpt.order import Order, micro_batch_seed, sequence_count
from elastic_gpt.reports import Reporter, peak_flops
from elastic_gpt.settings import SettingsError
from elastic_gpt.snapshot import Snapshots
from elastic_gpt.state import restore, training_state
from elastic_gpt.storage import Unreachable
from elastic_gpt.world import NotJoined, PeerLost, Signals, join, leave
from model_zoo.nanogpt.config import PRESETS, TrainConfig
from model_zoo.nanogpt.model import GPT
from model_zoo.nanogpt.rundir import open_run
from model_zoo.nanogpt.startup import arithmetic, loss_function, open_observers, open_snapshots, pick_dtype
from prepare.tokens import DataError, Meta, open_split, read_meta

FINISHED, RESTART_ME, NO_WORLD = 0, 3, 4  # exit codes; after any but 0 and a user's mistake (2) an agent tries again
LAST_CALL_SECONDS = 0.5
NETWORK_SECONDS = 2.0  # before another try to form a world: a network may need some to be up


def main(argv: Sequence[str] | None = None, prog: str = "elastic-gpt train") -> int:
    """Parse settings and train.

    Exit codes: 0 finished, 2 a user's mistake, 3 the world has to be formed anew, 4 it could not be formed, 130, 143.
    """
    try:
        config, meta = check(sys.argv[1:] if argv is None else argv, prog)
    except (SettingsError, DataError) as error:
        return settings.fail(error)
    try:
        return train(config, meta)
    except (SettingsError, DataError, CheckpointError) as error:
        return settings.fail(error)
    except PeerLost as error:
        if error.noticed_by:
            Ledger(config.run_dir).write("interrupted", node=error.noticed_by, cause="lost a peer")
        text = f"{error}; this worker ends, its agent forms a new world"
        # A peer that dies is nothing to tell; a world that cannot be formed may be a wrong setting of the network.
        print(f"warning: {text}" if isinstance(error, NotJoined) else text, file=sys.stderr, flush=True)
        if isinstance(error, NotJoined):
            time.sleep(NETWORK_SECONDS)
            os._exit(NO_WORLD)
        os._exit(RESTART_ME)  # a process group with a dead member cannot be torn down in good order
    except Unreachable as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # An outage passes, and the agent tries until it has; what never answered is a crash, and crashes are counted.
        os._exit(RESTART_ME if Ledger(config.run_dir).lives() else 1)
    except Exception:
        # At once: if the peers ended first, the agent would take this crash for a change of members.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def check(argv: Sequence[str], prog: str = "elastic-gpt train") -> tuple[TrainConfig, Meta]:
    """Everything about the settings and the data that can be wrong is found here, before any process is started."""
    config = settings.parse(TrainConfig, argv, presets=PRESETS, prog=prog, environment=settings.environment())
    meta = read_meta(config.data.dir)
    if 0 < config.model.vocab_size < meta.vocab_size:
        raise SettingsError(
            f"model.vocab_size {config.model.vocab_size} is less than the data's {meta.vocab_size}:"
            " leave it out, and the data's is taken"
        )
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or meta.vocab_size)
    config = dataclasses.replace(config, model=model)
    for split in ("train", "val"):
        if sequence_count(len(open_split(config.data.dir, split)), config.model.block_size) == 0:
            raise DataError(
                f"{config.data.dir / split}.bin is too short for one sequence of {config.model.block_size} tokens:"
                " prepare more text, or take a smaller --model.block-size"
            )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device is cuda, but torch finds no GPU here: leave --device out, or take --device cpu")
    return config, meta


def train(config: TrainConfig, meta: Meta) -> int:
    """One life of a run: join the world, restore, train until the end or until the world changes. Returns the exit code."""
    world = join(config.device, config.elastic.timeout_seconds)
    joined = time.time()
    signals = Signals()
    if config.elastic.exact and world.device.type == "mps":
        raise SettingsError(
            "elastic.exact sums in float64, which Apple GPUs do not have: leave it out, or take --device cpu"
        )
    run = open_run(config, meta, world)
    ledger = Ledger(config.run_dir)

    torch.manual_seed(config.seed)  # the same initial parameters everywhere
    torch.set_float32_matmul_precision("high")
    model = GPT(config.model).to(world.device)
    optimizer = torch.optim.AdamW(
        model.decay_groups(config.optimizer.weight_decay),
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        fused=world.device.type in ("cuda", "cpu"),
    )
    dtype = pick_dtype(config, world)
    scale = LossScale(world.device) if dtype == torch.float16 else None
    loss_sum = loss_function(model, config, dtype, world)

    train_tokens, val_tokens = open_split(config.data.dir, "train"), open_split(config.data.dir, "val")
    order = Order(sequence_count(len(train_tokens), config.model.block_size), config.global_batch, config.seed)
    batches = Batches(train_tokens, config.model.block_size, config.micro_batch, order, world)
    gradients = Gradients(
        model.parameters(),
        world,
        micro_batches=config.micro_batches,
        global_batch=config.global_batch,
        tokens=config.tokens_per_step,
        exact=config.elastic.exact,
    )
    evaluator = Evaluator(
        model,
        loss_sum,
        val_tokens,
        block_size=config.model.block_size,
        sequences=config.evaluate.sequences,
        micro_batch=config.micro_batch,
        world=world,
    )

    tensors = training_state(model, optimizer, scale.state if scale else None)
    snapshots = open_snapshots(run.run_id, tensors, world)
    place = config.checkpoint.dir or config.run_dir / "checkpoints"
    checkpoints = Checkpoints(place, config.checkpoint.keep, run.run_id)
    restored = restore(tensors, snapshots, checkpoints, run, world)
    nodes = sorted(set(world.gather(world.node)))
    observers, last_step = open_observers(config, nodes, world, restored, ledger)
    back = time.time()
    reporter = Reporter(
        observers,
        world,
        recent=restored.reports,
        keep=2 * config.elastic.snapshot_interval,
        tokens_per_step=config.tokens_per_step,
        flops_per_token=model.flops_per_token(),
        peak=peak_flops(world.device, dtype),
    )
    for line in arithmetic(config, meta, model, order, world, dtype, restored):
        reporter.say(line)
    if snapshots:
        snapshots.save(restored.step, run.life, tensors, restored.reports)  # now every node has it
    if world.first and restored.step - checkpoints.listed >= config.checkpoint.interval:
        checkpoints.save(restored.step, tensors, restored.reports)  # the one that was due died with its writer

    if restored.step >= config.steps:
        reporter.say(f"nothing to do at step {restored.step} of {config.steps}: a larger --steps goes on from there")

    def evaluate(step: int) -> None:
        loss = evaluator.evaluate()
        reporter.evaluation(step, loss)
        if world.first:
            ledger.write("evaluated", step=step, loss=loss)

    step, stopping, leaving = restored.step, 0, 0
    with on_its_way(snapshots, checkpoints, ledger):
        while step < config.steps and not stopping:
            if step > 0 and config.evaluate.interval > 0 and step % config.evaluate.interval == 0:
                evaluate(step)  # after the state is saved; if this world is asked to stop, the next one does it
            gradients.zero()
            for index, ids, tokens, targets in batches.step(step):
                torch.manual_seed(micro_batch_seed(config.seed, step, index))  # dropout: the same on whichever rank
                gradients.backward(index, ids, loss_sum(tokens, targets), scale.factor if scale else 1.0)
            sums = gradients.reduce(signals.stop, signals.leave)
            finite = scale.unscale(gradients.gradient) if scale else True
            norm = gradients.clip(config.optimizer.clip)
            rate = config.optimizer.rate(step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if finite:
                optimizer.step()
            step += 1

            snapshot = step % config.elastic.snapshot_interval == 0
            save = step % config.checkpoint.interval == 0 or (snapshot and checkpoints.owed)
            reporter.step(step, rate, sums, norm)
            # A GPU works on while the step before is reported; but nothing is saved before its report is written.
            if world.first and ledger.superseded():
                raise PeerLost(f"another world trains into {config.run_dir} since this one was formed")
            stopping, leaving = reporter.drain(behind=int(world.device.type == "cuda" and not (snapshot or save)))
            if world.first and step == restored.step + 1:
                ledger.recovered(last_step, joined, back)
            if snapshots and snapshot:
                snapshots.save(step, run.life, tensors, list(reporter.recent))
                snapshots.drop_others(nodes)
            tell_saved(checkpoints, ledger, reporter.say)
            if world.first and save:
                if checkpoints.pending:
                    reporter.say(f"WARNING: no checkpoint at step {step}: the one before is still being written")
                else:
                    checkpoints.save(step, tensors, list(reporter.recent))

        # Every rank is out of the loop after the same step: at the end, or because somebody was asked to stop.
        reporter.drain()
        finished = step >= config.steps
        if finished and restored.step < step:
            evaluate(step)
        if world.first and not finished:
            ledger.write("interrupted", node=world.node, cause="asked to stop", step=step)
        if snapshots:
            if not finished:
                snapshots.save(step, run.life, tensors, list(reporter.recent))
            snapshots.wait()
        if 0 < leaving < world.size and not finished:
            time.sleep(LAST_CALL_SECONDS)  # who is asked in the same moment hears it a little later
            leaving = sum(world.gather(signals.leave))
        deadline = time.monotonic() + config.elastic.grace_seconds - max(world.gather(signals.waited))

        def settle() -> bool:
            """Storage has this step when nodes leave, for it may not be the last node that does; and at the end."""

            def wait() -> None:
                while checkpoints.pending and (finished or time.monotonic() < deadline):
                    time.sleep(0.01)
                    tell_saved(checkpoints, ledger, reporter.say)

            wait()
            if (finished or leaving) and checkpoints.saved != step and not checkpoints.pending:
                checkpoints.save(step, tensors, list(reporter.recent))
                wait()
            return checkpoints.saved == step

        saved = world.first_does(settle)
        if world.first_of_node and signals.leave and not finished:
            ledger.write("left", node=world.node, step=step)
        if world.first and not finished and leaving == world.size:
            ledger.write("stopped", step=step)
            where = f"saved in {config.run_dir}" if saved else "NOT saved on storage"
            reporter.say(f"stopped after step {step}, {where}; the same command goes on from there")
        if world.first and finished and saved and restored.step < step:
            ledger.write("finished", step=step)
        reporter.close()
        if snapshots and saved and (finished or leaving == world.size):
            snapshots.discard()
    leave()
    if finished and not saved:
        raise CheckpointError(
            f"{config.run_dir} holds no checkpoint of the last step: make room, then run again to save it"
        )
    if finished or (world.elastic and signals.released):
        return FINISHED
    return RESTART_ME if world.elastic else 128 + signals.number


@contextlib.contextmanager
def on_its_way(snapshots: Snapshots | None, checkpoints: Checkpoints, ledger: Ledger) -> Iterator[None]:
    """What is being saved when a peer is lost is saved to its end: it may be the newest there is."""
    try:
        yield
    except PeerLost:
        if snapshots:
            snapshots.wait()
        tell_saved(checkpoints, ledger, print, wait=True)
        raise


def tell_saved(checkpoints: Checkpoints, ledger: Ledger, say: Callable[[str], None], wait: bool = False) -> None:
    """Write down what became of a checkpoint. A failed one is tried again with each snapshot, and told once."""
    again, result = checkpoints.failed, checkpoints.finished(wait)
    if isinstance(result, OSError) and not again:
        ledger.write("save_failed", error=str(result))
        say(f"WARNING: the checkpoint could not be written ({result}); training goes on, and it is tried again")
    elif isinstance(result, int):
        ledger.write("saved", step=result, checkpoint=checkpoints.name(result), place=str(checkpoints.storage))


if __name__ == "__main__":
    sys.exit(main())
