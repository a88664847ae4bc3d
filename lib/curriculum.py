"""The algorithm of the paper: rounds of discovery and training, from sure anchors to all. Layer 4.

    round 0                every sample is its own neighbourhood
    round r >= 1           entropies from the memory bank -> the int(N * select_rate * r) samples of lowest
                           entropy become anchors, each with its k nearest neighbours -> train on those
    in every round         epochs of steps; the learning rate and the best accuracy start again

Letters: B batch, b images of it of this process, N samples, D embedding, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lib import checkpoint, health, schedule
from lib.checkpoint import TrainingState
from lib.console import SUMMARY, UsageError, logger, progress, table
from lib.criterion import neighbourhood_loss
from lib.device import PRECISIONS
from lib.discovery import discover
from lib.files import reason
from lib.interrupt import Interrupts, Stopped
from lib.loader import Loader
from lib.neighbourhoods import Neighbourhoods, consistency, num_anchors
from lib.options import Options
from lib.protocols import Accuracy, Evaluator
from lib.seeding import Stream, seed_for
from lib.session import Session
from lib.world import World


@dataclass(frozen=True)
class Plan:
    """What the curriculum does, in numbers.

    Attributes:
        rounds: counting round 0.
        epochs: a round.
        select_rate: share of the samples that become anchors, times the round.
        size: K.
        iter_size: batches to an optimiser step.
        learning_rate: epoch within the round -> rate.
        display_freq: steps between updates of the loss beside the bar.
        autocast: precision of the steps' mixed precision; None: float32.
        ckpt_every: optimiser steps between checkpoints within an epoch; 0: none there.
        skip_nonfinite: a batch whose loss is not finite is left out, in place of stopping the run.
    """

    rounds: int
    epochs: int
    select_rate: float
    size: int
    iter_size: int
    learning_rate: schedule.Schedule
    display_freq: int
    autocast: torch.dtype | None = None
    ckpt_every: int = 0
    skip_nonfinite: bool = False


def build_plan(options: Options, learning_rate: schedule.Schedule, samples: int, processes: int = 1) -> Plan:
    """The plan of the options for N = ``samples``.

    Raises:
        UsageError: there are fewer samples than a batch or a neighbourhood takes, or fewer images in a batch than its
            processes take.
    """
    if options.batch_size < 2 * processes:
        raise UsageError(
            f"--batch-size {options.batch_size}: is of all {processes} processes together, and each takes two images "
            f"at least; set it to {2 * processes} or more"
        )
    if samples < options.batch_size:
        raise UsageError(
            f"{options.data_root or options.dataset}: {samples} training images are fewer than a batch of "
            f"{options.batch_size}; set --batch-size to {samples} or less, or bring more images"
        )
    if options.ANs_size >= samples:
        raise UsageError(
            f"--ANs-size {options.ANs_size}: {samples} training images leave an anchor only {samples - 1} "
            f"neighbours; set it to {samples - 1} or less"
        )
    return Plan(
        rounds=options.max_round,
        epochs=options.max_epoch,
        select_rate=options.ANs_select_rate,
        size=options.ANs_size,
        iter_size=options.iter_size,
        learning_rate=learning_rate,
        display_freq=options.display_freq,
        autocast=PRECISIONS[options.amp] if options.amp else None,
        ckpt_every=options.ckpt_every,
        skip_nonfinite=options.on_nonfinite == "skip",
    )


@dataclass(frozen=True)
class Helpers:
    """Whom the curriculum works with.

    Attributes:
        batches: the training images.
        evaluate: accuracy of the test images, or None where there are no labels.
        validate: accuracy of training images held out, which then choose the best epoch; None: the test images do,
            as in the reference.
        labels: (N,) on the bank's device, for the consistency alone; None where there are none.
        session: where results go.
        on_discovery: told the round and its neighbourhoods, when it starts or goes on.
        network_name: for the checkpoints.
        interrupts: whoever asks the run to stop.
        world: the processes that train together.
    """

    batches: Loader
    evaluate: Evaluator | None
    validate: Evaluator | None
    labels: torch.Tensor | None
    session: Session
    on_discovery: Callable[[int, Neighbourhoods], None]
    network_name: str
    interrupts: Interrupts = field(default_factory=Interrupts)
    world: World = field(default_factory=World)


CHECKED = 100
"""Steps on a GPU after which it is asked whether all losses were finite."""


class NonFiniteLossError(Exception):
    """A loss that is no number; the message is a sentence with the step, the learning rate and the samples."""


def run(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """Trains from where ``state`` is to the end of the last round.

    Raises:
        Stopped: from outside; the state is saved, as it is between two steps.
        NonFiniteLossError: the last checkpoint is from before that.
    """
    try:
        run_rounds(state, plan, helpers)
    except Stopped:
        helpers.interrupts.settle()
        save(state, helpers, is_best=False)
        raise


def run_rounds(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """The rounds that are left."""
    if state.round == plan.rounds - 1 and state.epoch >= plan.epochs:
        logger().info("all rounds are done; raise --max-round or --max-epoch to go on")
    while state.round < plan.rounds:
        if state.epoch == state.step == 0:
            start_round(state, plan, helpers)
        found = state.neighbourhoods
        if state.round:
            helpers.on_discovery(state.round, found)  # also where it goes on: TensorBoard hides what it said before
        scalars = {"ANs/Number": found.num_anchors, "ANs/Consistency": found.consistency}
        helpers.session.write_scalars(scalars, state.round)
        while state.epoch < plan.epochs:
            helpers.interrupts.check()
            run_epoch(state, plan, helpers)
        with helpers.interrupts.shield():
            finish_round(state, helpers)
            state.round, state.epoch = state.round + 1, 0


def start_round(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """Finds the anchors of the round and their neighbours; the best accuracy starts again."""
    bank, started = state.bank.rows, time.perf_counter()
    state.acc = state.best_acc = None
    if state.round == 0:
        return
    anchors = num_anchors(bank.samples, plan.select_rate, state.round)
    found = discover(bank, temperature=state.bank.temperature, anchors=anchors, size=plan.size)
    if helpers.labels is not None:
        found = replace(found, consistency=consistency(found.anchors, found.neighbours, helpers.labels))
    state.neighbourhoods = found
    logger().info(
        "round %d: %d anchors of %d samples%s (discovery took %.1f s)",
        state.round,
        found.num_anchors,
        bank.samples,
        "" if found.consistency is None else f", consistency {found.consistency:.1%}",
        time.perf_counter() - started,
    )


def run_epoch(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """One pass over the training images, then the accuracy, the records and the checkpoint."""
    rate, started, seen = plan.learning_rate(state.epoch), time.perf_counter(), state.seen if state.step else 0
    schedule.set_learning_rate(state.optimizer, rate)
    loss = train_epoch(state, plan, helpers)
    helpers.interrupts.check()
    trained, bank = time.perf_counter(), state.bank.rows
    helpers.world.follow(state.network.buffers())  # of batch normalisation: each process has its own statistics
    figures, measured = health.measure(
        bank, state.health, round=state.round, temperature=state.bank.temperature, size=plan.size
    )
    accuracy = helpers.evaluate(state.network, bank) if helpers.evaluate else None
    held_out = helpers.validate(state.network, bank) if helpers.validate else None
    times = {
        "images_per_s": (state.seen - seen) / (trained - started),
        "train_s": trained - started,
        "evaluate_s": time.perf_counter() - trained,
    }
    helpers.interrupts.check()
    with helpers.interrupts.shield():  # from here to the checkpoint, for all of it belongs together
        state.health = measured
        trained_by = {"loss": loss, "learning_rate": rate}
        record, is_best = finish_epoch(state, accuracy, held_out, trained_by, {**figures, **times})
        report_epoch(record, accuracy, plan, helpers)
        save(state, helpers, is_best)


def finish_epoch(
    state: TrainingState,
    accuracy: Accuracy | None,
    held_out: Accuracy | None,
    trained: dict[str, float],
    figures: dict[str, float | None],
) -> tuple[dict[str, Any], bool]:
    """Moves the state on to the next epoch; the record of this one, and whether it is the round's best so far."""
    chooser = held_out or accuracy
    state.acc = chooser.top1 if chooser else None
    is_best = state.acc is None or state.best_acc is None or state.acc > state.best_acc
    top1 = accuracy.top1 if accuracy else None
    before = state.history[-1] if state.history else {}
    best_top1 = top1 if is_best else before["best_top1"] if before.get("round") == state.round else state.best_acc
    state.best_acc = state.acc if is_best else state.best_acc
    record = {
        "round": state.round,
        "epoch": state.epoch,
        "anchors": state.neighbourhoods.num_anchors,
        "consistency": state.neighbourhoods.consistency,
        **trained,
        "top1": top1,
        "top5": accuracy.top5 if accuracy else None,
        "best_top1": best_top1,
        "val_top1": held_out.top1 if held_out else None,
        "skipped": state.skipped,
        **figures,
    }
    state.epoch, state.step = state.epoch + 1, 0
    state.history = [row for row in state.history if row["round"] < state.round] + [record]
    return record, is_best


def train_epoch(state: TrainingState, plan: Plan, helpers: Helpers) -> float:
    """Mean loss over the training images while the network learns from them, from the state's step on.

    ``iter_size`` batches make one optimiser step on the mean of their losses; so does what is left over at
    the end. The memory bank is updated after each batch's backward pass, which needs it as it was.

    Raises:
        Stopped: from outside; the state is as it is after a step of the optimiser.
        NonFiniteLossError: unless such batches are left out.
    """
    batches, device, shown = helpers.batches, state.bank.memory.device, 0.0
    first, steps = state.step, len(batches)
    if first == 0:
        state.total, state.seen, state.skipped = torch.zeros((), device=device), 0, 0
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)
    spoilt = torch.full((), -1, device=device)  # the first step whose loss was not finite
    where = f"round {state.round}/{plan.rounds - 1} epoch {state.epoch + 1}/{plan.epochs}"
    with helpers.interrupts.shield():
        bar = progress(batches.epoch(state.round, state.epoch, first), where, "batch", steps - first)
        for number, (images, index) in enumerate(bar, start=first):
            loss = train_step(state, plan, helpers.world, images, index, number, steps)
            done, saves, asked = number + 1, False, helpers.interrupts.asked()
            if done % plan.iter_size == 0 or done == steps:
                state.step = done
                saves = plan.ckpt_every > 0 and done < steps and done // plan.iter_size % plan.ckpt_every == 0
            if not plan.skip_nonfinite:
                spoilt = torch.where((spoilt < 0) & ~loss.isfinite(), number, spoilt)
                if device.type == "cpu" or done % CHECKED == 0 or done == steps or saves or asked:
                    refuse_nonfinite(state, helpers, int(spoilt))  # waits for the device
            if done == steps or saves or asked:
                refuse_nonfinite_weights(state, number)
            if saves:
                save(state, helpers, is_best=False)
            if asked and state.step == done:
                break
            if not bar.disable and number % plan.display_freq == 0 and time.monotonic() - shown > bar.mininterval:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)  # waits for the device
                shown = time.monotonic()
    return state.total.item() / max(1, state.seen)


def train_step(
    state: TrainingState,
    plan: Plan,
    world: World,
    images: torch.Tensor,
    index: torch.Tensor,
    number: int,
    steps: int,
) -> torch.Tensor:
    """One batch, and where it is the last of its group a step of the optimiser; the loss.

    Each process embeds its share of the images. From there on all know the whole batch, and their loss is the same.
    """
    device = images.device
    other = [world.rank] if world.rank else []
    torch.manual_seed(seed_for(state.seed, Stream.STEPS, state.round, state.epoch, number, *other))  # for dropout
    statistics = [buffer.clone() for buffer in state.network.buffers()] if plan.skip_nonfinite else []
    with torch.autocast(device.type, plan.autocast, enabled=plan.autocast is not None):
        own = state.network(images)  # (b, D), float32
    embeddings = world.gather(own, world.shares(len(index)))  # (B, D)
    loss = neighbourhood_loss(
        embeddings, state.bank.rows, state.neighbourhoods.of(index), temperature=state.bank.temperature
    )
    if plan.skip_nonfinite and not loss.isfinite():  # waits for the device
        state.skipped += 1
        for buffer, before in zip(state.network.buffers(), statistics, strict=True):
            buffer.copy_(before)  # batch normalisation has taken note of the batch already
    else:
        group_start = number - number % plan.iter_size
        state.scaler.scale(loss / min(plan.iter_size, steps - group_start)).backward()
        state.bank.update(embeddings.detach(), index)
        state.total += loss.detach() * len(index)
        state.seen += len(index)
    if (number + 1) % plan.iter_size == 0 or number + 1 == steps:
        if any(parameter.grad is not None for parameter in state.network.parameters()):  # all of it may be left out
            world.sum_gradients(state.network.parameters())
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def refuse_nonfinite(state: TrainingState, helpers: Helpers, step: int) -> None:
    """NonFiniteLossError where ``step`` is one, and not -1."""
    if step < 0:
        return
    samples = ", ".join(map(str, helpers.batches.indices(state.round, state.epoch, step)))
    rate = state.optimizer.param_groups[0]["lr"]
    raise NonFiniteLossError(
        f"the loss is not a finite number in round {state.round}, epoch {state.epoch + 1}, step {step + 1}, at a "
        f"learning rate of {rate:g}, for the training images {samples}; lower --base-lr, look at these images, or "
        "leave such batches out with --on-nonfinite skip; the last checkpoint is from before"
    )


def refuse_nonfinite_weights(state: TrainingState, step: int) -> None:
    """NonFiniteLossError where a gradient has spoilt the network though all losses were finite; before it is saved."""
    if not torch.stack([parameter.isfinite().all() for parameter in state.network.parameters()]).all():
        raise NonFiniteLossError(
            f"the network's weights are not finite numbers after round {state.round}, epoch {state.epoch + 1}, step "
            f"{step + 1}, at a learning rate of {state.optimizer.param_groups[0]['lr']:g}; lower --base-lr; the last "
            "checkpoint is from before"
        )


def report_epoch(record: dict[str, Any], accuracy: Accuracy | None, plan: Plan, helpers: Helpers) -> None:
    """The epoch's line, its record in metrics.jsonl and its TensorBoard scalars."""
    judged = ""
    if helpers.evaluate and accuracy:
        judged = f"  {helpers.evaluate.name} {accuracy} (best top-1 {record['best_top1']:.2%})"
    if record["val_top1"] is not None:
        judged += f"  held out top-1 {record['val_top1']:.2%}"
    logger().info(
        "round %d/%d epoch %d/%d  loss %.4f  lr %.4g  %.0f images/s%s",
        record["round"],
        plan.rounds - 1,
        record["epoch"] + 1,
        plan.epochs,
        record["loss"],
        record["learning_rate"],
        record["images_per_s"],
        judged,
    )
    helpers.session.write_metrics(record)
    tags = {"Train/Loss": "loss", "Train/Learning_Rate": "learning_rate", "Evaluate/Rank-1": "top1"}
    scalars = {tag: record[name] for tag, name in tags.items()}
    scalars |= {f"Health/{name}": value for name, value in record.items() if name in health.FIGURES}
    helpers.session.write_scalars(scalars, record["epoch"], (record["round"], record["anchors"]))


def save(state: TrainingState, helpers: Helpers, is_best: bool) -> None:
    """The latest checkpoint, and the round's best where this is it (without labels: the last).

    Where they cannot be written the log says so, the last good ones stay, and the next epoch tries again.
    """
    session = helpers.session
    content = state.checkpoint(helpers.network_name, session.name)  # of all processes together
    best = session.of_round("checkpoint", state.round, state.neighbourhoods.num_anchors, "ckpt") if is_best else None
    state.unsaved = None
    for path in (session.latest(), best):
        if path:
            try:
                with helpers.interrupts.shield():
                    checkpoint.save(content, path)
            except OSError as error:
                state.unsaved = f"{path}: could not be saved: {reason(error)}"
                logger().warning("%s; the last good one stays, and the next epoch tries again", state.unsaved)


def finish_round(state: TrainingState, helpers: Helpers) -> None:
    """The round's line and its global scalars."""
    last = state.history[-1] if state.history else {}
    if last.get("round") != state.round:  # a finished round of a checkpoint that tells nothing of it
        return
    helpers.session.write_scalars({"Evaluate/best_acc": last["best_top1"]}, state.round)
    accuracy = f", top-1 {last['top1']:.2%} at the last epoch, best {last['best_top1']:.2%}" if helpers.evaluate else ""
    logger().info(
        "round %d done: %d anchors, loss %.4f%s", state.round, last["anchors"], last["loss"], accuracy, extra=SUMMARY
    )


def summary(history: list[dict[str, Any]], helpers: Helpers) -> str:
    """The table of all rounds and how its figures came about; no columns that need labels without them."""
    columns: list[tuple[str, str, str]] = [
        ("round", "round", "d"),
        ("anchors", "anchors", "d"),
        ("consistency", "consistency", ".1%"),
        ("loss", "loss", ".4f"),
        ("top-1 last", "top1", ".2%"),
        ("top-1 best", "best_top1", ".2%"),
        ("top-5 last", "top5", ".2%"),
        ("held-out last", "val_top1", ".2%"),
    ]
    shown = [c for c in columns if any(row.get(c[1]) is not None for row in history)]
    rows = [["-" if row.get(key) is None else format(row[key], form) for _, key, form in shown] for row in history]
    text = table([title for title, _, _ in shown], rows)
    if helpers.evaluate:
        chooser = "held-out training images" if helpers.validate else "the test labels"
        text += f"\ntop-1, top-5: {helpers.evaluate.name} against the memory bank; best: chosen by {chooser}"
    return text
