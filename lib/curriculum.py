"""The algorithm of the paper: rounds of discovery and training, from sure anchors to all. Layer 4.

    round 0                every sample is its own neighbourhood
    round r >= 1           entropies from the memory bank -> the int(N * select_rate * r) samples of lowest
                           entropy become anchors, each with its k nearest neighbours -> train on those
    in every round         epochs of steps; the learning rate and the best accuracy start again

Letters: B batch, N samples, D embedding, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lib import checkpoint, health, schedule
from lib.checkpoint import TrainingState
from lib.console import SUMMARY, UsageError, logger, progress, table
from lib.criterion import neighbourhood_loss
from lib.device import PRECISIONS
from lib.loader import Loader
from lib.neighbourhoods import Neighbourhoods, consistency, discover, num_anchors
from lib.options import Options
from lib.protocols import Accuracy, Evaluator
from lib.seeding import Stream, seed_for
from lib.session import Session


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
    """

    rounds: int
    epochs: int
    select_rate: float
    size: int
    iter_size: int
    learning_rate: schedule.Schedule
    display_freq: int
    autocast: torch.dtype | None = None


def build_plan(options: Options, learning_rate: schedule.Schedule, *, samples: int) -> Plan:
    """The plan of the options for N = ``samples``.

    Raises:
        UsageError: there are fewer samples than a batch or a neighbourhood takes.
    """
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
        on_discovery: told the round and what was found.
        network_name: for the checkpoints.
    """

    batches: Loader
    evaluate: Evaluator | None
    validate: Evaluator | None
    labels: torch.Tensor | None
    session: Session
    on_discovery: Callable[[int, Neighbourhoods], None]
    network_name: str


def run(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """Trains from where ``state`` is to the end of the last round."""
    if state.round == plan.rounds - 1 and state.epoch >= plan.epochs:
        logger().info("all rounds are done; raise --max-round or --max-epoch to go on")
    while state.round < plan.rounds:
        if state.epoch == 0:
            start_round(state, plan, helpers)
        found = state.neighbourhoods
        scalars = {"ANs/Number": found.num_anchors, "ANs/Consistency": found.consistency}
        helpers.session.write_scalars(scalars, state.round)
        while state.epoch < plan.epochs:
            run_epoch(state, plan, helpers)
        finish_round(state, helpers)
        state.round, state.epoch = state.round + 1, 0


def start_round(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """Finds the anchors of the round and their neighbours; the best accuracy starts again."""
    memory, started = state.bank.memory, time.perf_counter()
    state.acc = state.best_acc = None
    if state.round == 0:
        return
    anchors = num_anchors(len(memory), plan.select_rate, state.round)
    found = discover(memory, temperature=state.bank.temperature, anchors=anchors, size=plan.size)
    if helpers.labels is not None:
        found = replace(found, consistency=consistency(found.anchors, found.neighbours, helpers.labels))
    state.neighbourhoods = found
    helpers.on_discovery(state.round, found)
    logger().info(
        "round %d: %d anchors of %d samples%s (discovery took %.1f s)",
        state.round,
        found.num_anchors,
        len(memory),
        "" if found.consistency is None else f", consistency {found.consistency:.1%}",
        time.perf_counter() - started,
    )


def run_epoch(state: TrainingState, plan: Plan, helpers: Helpers) -> None:
    """One pass over the training images, then the accuracy, the records and the checkpoint."""
    rate, started = plan.learning_rate(state.epoch), time.perf_counter()
    schedule.set_learning_rate(state.optimizer, rate)
    loss = train_epoch(state, plan, helpers.batches)
    trained = time.perf_counter()
    figures, state.health = health.measure(
        state.bank.memory, state.health, round=state.round, temperature=state.bank.temperature, size=plan.size
    )
    accuracy = helpers.evaluate(state.network, state.bank.memory) if helpers.evaluate else None
    held_out = helpers.validate(state.network, state.bank.memory) if helpers.validate else None
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
        "loss": loss,
        "learning_rate": rate,
        "top1": top1,
        "top5": accuracy.top5 if accuracy else None,
        "best_top1": best_top1,
        "val_top1": held_out.top1 if held_out else None,
        **figures,
        "images_per_s": len(state.bank.memory) / (trained - started),
        "train_s": trained - started,
        "evaluate_s": time.perf_counter() - trained,
    }
    state.epoch += 1
    state.history = [row for row in state.history if row["round"] < state.round] + [record]
    report_epoch(record, accuracy, plan, helpers)
    save(state, helpers, is_best)


def train_epoch(state: TrainingState, plan: Plan, batches: Loader) -> float:
    """Mean loss over the training images while the network learns from them.

    ``iter_size`` batches make one optimiser step on the mean of their losses; so does what is left over at
    the end. The memory bank is updated after each batch's backward pass, which needs it as it was.
    """
    device = state.bank.memory.device
    torch.manual_seed(seed_for(state.seed, Stream.STEPS, state.round, state.epoch))  # dropout, where a network has it
    state.network.train()
    state.optimizer.zero_grad(set_to_none=True)
    total, seen, shown = torch.zeros((), device=device), 0, 0.0
    steps = len(batches)
    where = f"round {state.round}/{plan.rounds - 1} epoch {state.epoch + 1}/{plan.epochs}"
    bar = progress(batches.epoch(state.round, state.epoch), where, "batch", steps)
    for number, (images, index) in enumerate(bar):
        with torch.autocast(device.type, plan.autocast, enabled=plan.autocast is not None):
            embeddings = state.network(images)  # (B, D), float32
        loss = neighbourhood_loss(
            embeddings, state.bank.memory, state.neighbourhoods.of(index), temperature=state.bank.temperature
        )
        group_start = number - number % plan.iter_size
        state.scaler.scale(loss / min(plan.iter_size, steps - group_start)).backward()
        state.bank.update(embeddings.detach(), index)
        if (number + 1) % plan.iter_size == 0 or number + 1 == steps:
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
        total += loss.detach() * len(index)
        seen += len(index)
        if not bar.disable and number % plan.display_freq == 0 and time.monotonic() - shown > bar.mininterval:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)  # waits for the device
            shown = time.monotonic()
    return total.item() / seen


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
    """The latest checkpoint, and the round's best where this is it (without labels: the last)."""
    session = helpers.session
    best = session.of_round("checkpoint", state.round, state.neighbourhoods.num_anchors, "ckpt") if is_best else None
    for path in (session.latest(), best):
        if path:
            checkpoint.save(state.checkpoint(helpers.network_name, session.name), path)


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
