"""What epochs and rounds leave: figures, log lines, TensorBoard's scalars, checkpoints."""

from __future__ import annotations

from typing import Any

from lib.evaluation.classifier import Accuracy
from lib.method import diagnostics
from lib.session.atomic_files import reason
from lib.session.console import SUMMARY, logger, table
from lib.training import checkpoint
from lib.training.checkpoint import TrainingState
from lib.training.plan import Helpers, Plan


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
    is_best = state.acc is None or state.best_acc is None or state.acc >= state.best_acc  # as in the reference
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
    scalars |= {f"Health/{name}": value for name, value in record.items() if name in diagnostics.FIGURES}
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
