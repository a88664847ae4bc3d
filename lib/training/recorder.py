"""Writes the records of training: log lines, metrics.jsonl, TensorBoard, pictures of anchors, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lib.config.options import Options
from lib.distributed.signals import StopSignals
from lib.evaluation.classifier import Accuracy
from lib.method import diagnostics
from lib.method.collapse import find_collapse
from lib.session import image_grid
from lib.session.atomic_files import reason
from lib.session.console import SUMMARY, logger, table
from lib.session.run_folder import Session
from lib.training import checkpoint
from lib.training.checkpoint import Checkpoint, TrainingState


class Recorder:
    """Records the progress of training. It does not change the training state.

    Args:
        signals: stop signals, which are deferred while a checkpoint is written.
        protocol: name of the evaluation protocol; '' without labels.
        against: the training features that it compares with.
        images, labels: the training images, for the pictures of anchors; labels may be None.
        epochs: records of the epochs before this start, which may have been warned of already.

    Attributes:
        unsaved: why the last checkpoint could not be written; None if it was written.
    """

    def __init__(
        self,
        session: Session,
        options: Options,
        signals: StopSignals | None = None,
        *,
        protocol: str = "",
        against: str = "the memory bank",
        images: Sequence[np.ndarray] = (),
        labels: np.ndarray | None = None,
        epochs: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.session = session
        self.options = options
        self.signals = signals or StopSignals()
        self.protocol = protocol
        self.against = against
        self.images = images
        self.labels = labels
        self.unsaved: str | None = None
        self._shown = 0.0
        self._saved_at: float | None = None  # time.monotonic() after the last successful save
        self._best: tuple[Path, Checkpoint] | None = None  # the best checkpoint of a round, not yet written
        self._host_copy: Checkpoint | None = None  # memory of the last best checkpoint, to be overwritten
        self._epochs = list(epochs)
        self._has_warned = bool(self._sign_of_collapse())

    def round_started(self, state: TrainingState) -> None:
        """Writes the picture of anchors and neighbours, and the scalars of the round.

        Also for a resumed round, as TensorBoard hides the values that were written before the restart.
        """
        found = state.neighbourhoods
        if state.round:
            path = self.session.of_round("neighbours", state.round, found.num_anchors, "png")
            with self.session.warn_on_write_error("the picture of anchors and neighbours"):
                if path and (
                    picture := image_grid.save_anchors(path, self.images, self.labels, found.anchors, found.neighbours)
                ):
                    self.session.write_picture("ANs/Neighbours", np.asarray(picture), state.round)
        scalars = {"ANs/Number": found.num_anchors, "ANs/Consistency": found.consistency}
        self.session.write_scalars(scalars, state.round)

    def step_finished(self, bar: tqdm[Any], number: int, loss: torch.Tensor) -> None:
        """Shows the loss of a batch next to the progress bar, every ``display_freq`` steps."""
        if not bar.disable and number % self.options.display_freq == 0:
            now = time.monotonic()
            if now - self._shown > bar.mininterval:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)  # waits for the device
                self._shown = now

    def epoch_finished(self, record: dict[str, Any], accuracy: Accuracy | None) -> None:
        """Writes the log line of the epoch, its record in metrics.jsonl and its TensorBoard scalars."""
        judged = ""
        if accuracy:
            judged = f"  {self.protocol} {accuracy} (best top-1 {record['best_top1']:.2%})"
        if record["val_top1"] is not None:
            judged += f"  held out top-1 {record['val_top1']:.2%}"
        if record["embed_top1"] is not None:
            judged += f"  {self.options.embed}, recomputed, top-1 {record['embed_top1']:.2%}"
        logger().info(
            "round %d/%d epoch %d/%d  loss %.4f  lr %.4g  %.0f images/s%s",
            record["round"],
            self.options.max_round - 1,
            record["epoch"] + 1,
            self.options.max_epoch,
            record["loss"],
            record["learning_rate"],
            record["images_per_s"],
            judged,
        )
        self.session.write_metrics(record)
        tags = {"Train/Loss": "loss", "Train/Learning_Rate": "learning_rate", "Evaluate/Rank-1": "top1"}
        scalars = {tag: record[name] for tag, name in tags.items()}
        scalars |= {f"Health/{name}": value for name, value in record.items() if name in diagnostics.FIGURES}
        self.session.write_scalars(scalars, record["epoch"], (record["round"], record["anchors"]))
        self._warn_of_collapse(record)

    def _warn_of_collapse(self, record: dict[str, Any]) -> None:
        """Warns once where the epochs up to ``record`` show that training has collapsed."""
        if self._has_warned:
            return
        self._epochs.append(record)
        if sign := self._sign_of_collapse():
            logger().warning("warning: %s", sign)
            self._has_warned = True

    def _sign_of_collapse(self) -> str:
        return find_collapse(
            self._epochs,
            samples=len(self.images),
            size=self.options.ANs_size,
            low_dim=self.options.low_dim,
            temperature=self.options.npc_temperature,
        )

    def round_finished(self, state: TrainingState) -> None:
        """Writes the log line of the round and its global TensorBoard scalars."""
        last = state.history[-1] if state.history else {}
        if last.get("round") != state.round:  # resumed from a checkpoint without this round's history
            return
        self.session.write_scalars({"Evaluate/best_acc": last["best_top1"]}, state.round)
        known = last["top1"] is not None
        accuracy = f", top-1 {last['top1']:.2%} at the last epoch, best {last['best_top1']:.2%}" if known else ""
        logger().info(
            "round %d done: %d anchors, loss %.4f%s",
            state.round,
            last["anchors"],
            last["loss"],
            accuracy,
            extra=SUMMARY,
        )

    def is_save_due(self) -> bool:
        """Whether the last save failed, is ``--ckpt-interval`` seconds ago, or there was none. Only rank 0 knows."""
        if self._saved_at is None or self.unsaved is not None:
            return True
        return time.monotonic() - self._saved_at >= self.options.ckpt_interval

    def keep_best(self, state: TrainingState) -> None:
        """Keeps the state in host memory as the best checkpoint of its round, which the next ``save`` writes.

        Call it on every rank; rank 0 keeps it. ``--keep last`` keeps nothing.
        """
        if self.options.keep == "last":
            return
        content = checkpoint.without_copies(state.checkpoint(self.options.network, self.session.name))
        path = self.session.of_round("checkpoint", state.round, state.neighbourhoods.num_anchors, "ckpt")
        if path:
            self._keep(content, path)

    def save(self, state: TrainingState, is_best: bool) -> None:
        """Writes the latest checkpoint and, if ``--keep`` allows it, the best of the round.

        The best is the current state if ``is_best``, otherwise what ``keep_best`` kept since the last save. It is
        written first: a run that is killed between the two repeats the epochs since the latest checkpoint, and does not
        lose the best one.

        Call it on every rank. If a file cannot be written, a warning is logged, the previous files are kept, and the
        next epoch tries again.
        """
        session, anchors = self.session, state.neighbourhoods.num_anchors
        content = state.checkpoint(self.options.network, session.name)
        best, discovery = (
            session.of_round(kind, state.round, anchors, "ckpt") for kind in ("checkpoint", "neighbours")
        )
        unwritten = dict([self._best] if self._best else [])  # of an earlier round if the last save failed
        if best and is_best and self.options.keep != "last":
            unwritten[best] = checkpoint.without_copies(content)
        self.unsaved = self._best = None
        for path, kept in unwritten.items():
            if not self._write(kept, path):
                self._keep(kept, path)
        if latest := session.latest():
            self._write(content, latest)
        if not self.unsaved:
            self._saved_at = time.monotonic()
        if session.folder and best and discovery and self.options.keep != "all" and not self.unsaved:
            with self.signals.defer(), session.warn_on_write_error("the neighbourhoods of the round"):
                if is_best or not discovery.exists():
                    checkpoint.save_discovery(content, discovery)
                checkpoint.remove_best_checkpoints(session.folder, best if self.options.keep == "best" else None)

    def _write(self, content: Checkpoint, path: Path) -> bool:
        """Writes a checkpoint; returns whether it was written. If not, ``unsaved`` and a warning say why."""
        try:
            with self.signals.defer():
                checkpoint.save(content, path)
        except OSError as error:
            self.unsaved = f"{path}: could not be saved: {reason(error)}"
            logger().warning("%s; the previous file is kept, and the next epoch tries again", self.unsaved)
            return False
        return True

    def _keep(self, content: Checkpoint, path: Path) -> None:
        self._best = None  # not partly overwritten if memory runs out
        self._host_copy = checkpoint.copy_to_host(content, self._host_copy)
        self._best = path, self._host_copy

    def summary(self, history: list[dict[str, Any]]) -> str:
        """A table of the metrics of all rounds, and how they were measured. Columns without values are omitted."""
        columns: list[tuple[str, str, str]] = [
            ("round", "round", "d"),
            ("anchors", "anchors", "d"),
            ("consistency", "consistency", ".1%"),
            ("loss", "loss", ".4f"),
            ("top-1 last", "top1", ".2%"),
            ("top-1 best", "best_top1", ".2%"),
            ("top-5 last", "top5", ".2%"),
            ("held-out last", "val_top1", ".2%"),
            (f"{self.options.embed} last", "embed_top1", ".2%"),
        ]
        shown = [c for c in columns if any(row.get(c[1]) is not None for row in history)]
        rows = [["-" if row.get(key) is None else format(row[key], form) for _, key, form in shown] for row in history]
        text = table([title for title, _, _ in shown], rows)
        if self.protocol:
            chooser = "held-out training images" if self.options.val_fraction else "the test labels"
            text += f"\ntop-1, top-5: {self.protocol} against {self.against}; best: chosen by {chooser}"
        return text
