"""The algorithm of the paper: rounds of discovery and training, from the most certain anchors to all samples.

    round 0         every sample is its own neighbourhood
    round r >= 1    entropies from the memory bank -> the int(N * select_rate * r) samples of lowest entropy become
                    anchors, each with its k nearest neighbours -> train on these neighbourhoods
    in every round  epochs of steps; the learning rate and the best accuracy start again

Letters: B images of a batch, b of them on this rank, V views of each, N samples, D embedding, K neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from lib.config.options import Options
from lib.data.loader import Batch, Loader
from lib.distributed.data_parallel import GradientSum
from lib.distributed.device import PRECISIONS
from lib.distributed.processes import Ranks
from lib.distributed.signals import GPU_STEPS, Stopped, StopSignals
from lib.errors import NonFiniteLossError
from lib.evaluation.classifier import Accuracy, Evaluator
from lib.method import diagnostics
from lib.method.discovery import discover
from lib.method.neighbourhoods import consistency, num_anchors, num_neighbours
from lib.method.terms import PAPER_TERMS, EmbeddedBatch, Term, mean_direction, total
from lib.seeding import Stream, seed_for
from lib.session.console import logger, progress
from lib.training import optim
from lib.training.checkpoint import TrainingState
from lib.training.recorder import Recorder

SPECIALISED = 16
"""PyTorch compiles a network again for fewer images than these: for 0 and 1 on any device, for all of them on CPUs."""


@dataclass
class Trainer:
    """Trains ``state`` to the end of the last round.

    Attributes:
        options: max_round, max_epoch, ANs_select_rate, ANs_size, iter_size and so on.
        state: everything that training changes; a checkpoint holds it.
        loader: the training images.
        learning_rate: epoch of its span (a round, or the run) -> learning rate.
        recorder: writes logs, metrics and checkpoints.
        terms: of the loss, functions of the embedded batch.
        labels: (N,) on the bank's device, used for the consistency only; None without labels.
        evaluate: accuracy on the test images; None without labels.
        validate: accuracy on held-out training images, which then select the best epoch; None: the test images do, as
            in the reference.
        evaluate_stage: accuracy by the stage of ``--embed``, after the last epoch of a round; None for the embeddings.
        signals: stop requests.
        ranks: the ranks that train together.
    """

    options: Options
    state: TrainingState
    loader: Loader
    learning_rate: optim.Schedule
    recorder: Recorder
    terms: Sequence[Term] = PAPER_TERMS
    labels: torch.Tensor | None = None
    evaluate: Evaluator | None = None
    validate: Evaluator | None = None
    evaluate_stage: Callable[[], Accuracy] | None = None
    signals: StopSignals = field(default_factory=StopSignals)
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        may_skip = self.options.on_nonfinite == "skip"
        self.gradients = GradientSum(self.state.network, self.ranks, may_skip=may_skip)
        on_gpus = self.state.bank.memory.device.type == "cuda" and self.ranks.size > 1
        self.steps_between_requests = GPU_STEPS if on_gpus else 1

    def fit(self) -> None:
        """Trains the remaining rounds.

        Raises:
            Stopped: a signal stopped the run; the state between two optimiser steps is saved.
            NonFiniteLossError: the last checkpoint is from before that step.
        """
        state, options = self.state, self.options
        if state.round == options.max_round - 1 and state.epoch >= options.max_epoch:
            logger().info("all rounds are done; raise --max-round or --max-epoch to continue")
        try:
            while state.round < options.max_round:
                self.train_round()
        except Stopped:
            self.signals.finish_stopping()
            self.recorder.save(state, is_best=False)
            raise

    def train_round(self) -> None:
        """Discovery, then the remaining epochs of the round."""
        state = self.state
        if state.epoch == state.step == 0:
            state.acc = state.best_acc = None
            self.discover()
        self.recorder.round_started(state)
        while state.epoch < self.options.max_epoch:
            self.signals.raise_if_stopped()
            if self.is_discovery_repeated():
                self.discover()
            self.train_epoch()
        with self.signals.defer():
            self.recorder.round_finished(state)
            state.round, state.epoch = state.round + 1, 0

    def is_discovery_repeated(self) -> bool:
        """Whether ``--ANs-every`` requests a discovery before the next epoch, which is not the first of the round."""
        state, every = self.state, self.options.ANs_every
        return every > 0 and state.epoch > 0 and state.step == 0 and state.epoch % every == 0

    def discover(self) -> None:
        """Finds the anchors of the round and their neighbours."""
        state, options, started = self.state, self.options, time.perf_counter()
        if state.round == 0:
            return
        anchors = num_anchors(state.bank.samples, options.ANs_select_rate, state.round)
        found = discover(
            state.bank.rows,
            temperature=state.bank.temperature,
            anchors=anchors,
            size=num_neighbours(options.ANs_size, options.ANs_size_first, state.round, options.max_round),
            reciprocal_first=options.ANs_reciprocal_first,
        )
        if self.labels is not None:
            found = replace(found, consistency=consistency(found.anchors, found.neighbours, self.labels))
        state.neighbourhoods = found
        logger().info(
            "round %d: %d anchors of %d samples%s (discovery took %.1f s)",
            state.round,
            found.num_anchors,
            state.bank.samples,
            "" if found.consistency is None else f", consistency {found.consistency:.1%}",
            time.perf_counter() - started,
        )

    def train_epoch(self) -> None:
        """One pass over the training images, its evaluation, and a checkpoint."""
        state, started, passes = self.state, time.perf_counter(), self.state.passes
        learning_rate = self.learning_rate(optim.epoch_of_span(self.options, state.round, state.epoch))
        optim.set_learning_rate(state.optimizer, learning_rate)
        with self.signals.defer():
            self.train_steps()
        self.signals.raise_if_stopped()
        trained, bank = time.perf_counter(), state.bank.rows
        self.ranks.broadcast(state.network.buffers())  # batch normalisation: each rank has statistics of its own images
        health, measured = diagnostics.measure(
            bank,
            state.health,
            round=state.round,
            temperature=state.bank.temperature,
            size=self.options.ANs_size,
        )
        accuracy = self.evaluate(state.network, bank) if self.evaluate else None
        held_out = self.validate(state.network, bank) if self.validate else None
        ends_round = state.epoch + 1 == self.options.max_epoch
        by_stage = self.evaluate_stage() if self.evaluate_stage and ends_round else None
        record = {
            "loss": state.total.item() / max(1, state.seen),
            "learning_rate": learning_rate,
            **health,
            "embed_top1": by_stage.top1 if by_stage else None,
            "passes": state.passes / state.bank.samples,
            "images_per_s": (state.passes - passes) / (trained - started),
            "train_s": trained - started,
            "evaluate_s": time.perf_counter() - trained,
        }
        self.signals.raise_if_stopped()
        with (
            self.signals.defer()
        ):  # signals are deferred from here to the checkpoint, as record and checkpoint belong together
            state.health = measured
            is_best = self.finish_epoch(accuracy, held_out, record)
            self.recorder.epoch_finished(state.history[-1], accuracy)
            is_due = state.epoch == self.options.max_epoch or self.recorder.is_save_due()
            if self.ranks.any_rank(self.ranks.is_rank0 and is_due):  # saving is a collective, and clocks differ
                self.recorder.save(state, is_best)
            elif is_best:
                self.recorder.keep_best(state)

    def finish_epoch(self, accuracy: Accuracy | None, held_out: Accuracy | None, figures: dict[str, Any]) -> bool:
        """Adds the epoch's record to the history and advances the counters; returns whether it is the round's best."""
        state, chooser = self.state, held_out or accuracy
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
            "top1": top1,
            "top5": accuracy.top5 if accuracy else None,
            "best_top1": best_top1,
            "val_top1": held_out.top1 if held_out else None,
            "skipped": state.skipped,
            **figures,
        }
        state.epoch, state.step = state.epoch + 1, 0
        state.history = [row for row in state.history if row["round"] < state.round] + [record]
        return is_best

    def train_steps(self) -> None:
        """The remaining steps of the epoch, with ``iter_size`` batches each; the last may have fewer."""
        state, batches = self.state, len(self.loader)
        if state.step == 0:
            state.total, state.seen, state.skipped = torch.zeros((), device=state.bank.memory.device), 0, 0
        state.network.train()
        state.optimizer.zero_grad(set_to_none=True)
        nonfinite = NonFiniteCheck(self)
        where = f"round {state.round}/{self.options.max_round - 1} epoch {state.epoch + 1}/{self.options.max_epoch}"
        loaded = self.loader.epoch(state.round, state.epoch, state.step)
        bar = progress(loaded, where, "batch", batches - state.step)
        iterator = iter(bar)
        while state.step < batches:
            group = min(self.options.iter_size, batches - state.step)
            for number, batch in enumerate(islice(iterator, group), start=state.step):
                loss = self.backward(batch, number, group)
                nonfinite.add(loss, number)
                self.recorder.step_finished(bar, number, loss)
            self.optimizer_step()
            state.step += group
            every = self.options.ckpt_every * self.options.iter_size
            saves = every > 0 and state.step < batches and state.step % every == 0
            asks = state.step == batches or state.step // self.options.iter_size % self.steps_between_requests == 0
            stops = asks and self.signals.is_stop_requested()
            if saves or stops or state.step == batches:
                nonfinite.check()
                nonfinite.check_weights()
            if saves:
                self.recorder.save(state, is_best=False)
            if stops:
                break

    def backward(self, batch: Batch, number: int, group: int) -> torch.Tensor:
        """Adds the gradient of one batch, then updates the memory bank; returns the loss of the batch.

        Args:
            batch: images (b V, 3, h, w) of this rank and the sample indices (B,) of the whole batch.
            number: of the batch in the epoch.
            group: number of batches in the optimiser step, over whose mean loss it steps.
        """
        state, (images, index) = self.state, batch
        other = [self.ranks.rank] if self.ranks.rank else []
        torch.manual_seed(seed_for(state.seed, Stream.STEPS, state.round, state.epoch, number, *other))  # for dropout
        skips = self.options.on_nonfinite == "skip"
        buffers = [buffer.clone() for buffer in state.network.buffers()] if skips else []
        precision = PRECISIONS[self.options.amp] if self.options.amp else None
        with self.stance(len(index)), self.gradients.batch(is_last=number == state.step + group - 1) as network:
            loss, embeddings = batch_loss(
                state, self.terms, self.ranks, images, index, precision, network, views=self.options.views
            )
            if skips and not loss.isfinite():  # waits for the device
                state.skipped += 1
                _restore(state.network.buffers(), buffers)  # the running statistics already include the batch
                return loss.detach()
            state.scaler.scale(loss / group).backward()
        state.bank.update(embeddings, index)  # after the backward pass, which needs the old rows
        state.total += loss.detach() * len(index)
        state.seen += len(index)
        state.passes += len(index) * self.options.views
        return loss.detach()

    def stance(self, batch: int) -> AbstractContextManager[object]:
        """A context in which no rank runs compiled code, for a last batch (B) that leaves few images to one of them.

        Code is compiled anew for such sizes, and ranks with different code may order the collectives of ``--sync-bn``
        differently.
        """
        if not self.options.compile or self.ranks.size == 1 or batch == self.options.images_per_batch:
            return nullcontext()
        is_small = min(self.ranks.local_batch_sizes(batch)) < SPECIALISED
        return torch.compiler.set_stance("force_eager") if is_small else nullcontext()

    def optimizer_step(self) -> None:
        """One optimiser step with the gradients of ``backward``, summed over the ranks."""
        state = self.state
        if any(
            parameter.grad is not None for parameter in state.network.parameters()
        ):  # all batches may have been skipped
            self.gradients.finish()
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)


def batch_loss(
    state: TrainingState,
    terms: Sequence[Term],
    ranks: Ranks,
    images: torch.Tensor,
    index: torch.Tensor,
    precision: torch.dtype | None = None,
    network: torch.nn.Module | None = None,
    *,
    views: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, and the embeddings of its images.

    Each rank embeds its share of the images. The embeddings are then gathered, so all ranks compute the same loss.

    Args:
        state: network, memory bank and neighbourhoods.
        terms: of the loss.
        ranks: the ranks.
        images: (b V, 3, h, w) of this rank, the views of an image one after another.
        index: (B,) samples of the whole batch.
        precision: of mixed precision; None: float32.
        network: wrapper of the network of ``state``; None: the network itself.
        views: V.

    Returns:
        Scalar and (B, D), the normalised means of the views, both the same on every rank; the gradient of the loss goes
        to the images of this rank.
    """
    with torch.autocast(images.device.type, precision, enabled=precision is not None):
        local = (network or state.network)(images)  # (b V, D), float32
    local = local.reshape(-1, views, local.shape[1])
    embeddings = ranks.all_gather_batch(local, ranks.local_batch_sizes(len(index)))  # (B, V, D)
    neighbourhoods, temperature = state.neighbourhoods.of(index), state.bank.temperature
    batch = EmbeddedBatch(embeddings, state.bank.rows, neighbourhoods, temperature, state.round)
    return total(terms, batch), mean_direction(embeddings.detach())


class NonFiniteCheck:
    """Stops training at the first batch whose loss is NaN or infinite.

    On a GPU reading a loss makes the host wait, so the number of the first such batch is kept on the device and read
    only from time to time.

    Args:
        trainer: whose state is checked.
    """

    EVERY = 100
    """Batches on a GPU between two readings."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.device = trainer.state.bank.memory.device
        self.first = torch.full((), -1, device=self.device)  # the first batch of the epoch with such a loss, or -1

    def add(self, loss: torch.Tensor, number: int) -> None:
        """Records the loss of a batch of the epoch; sometimes calls ``check``."""
        if self.trainer.options.on_nonfinite == "skip":
            return
        self.first = torch.where((self.first < 0) & ~loss.isfinite(), number, self.first)
        if self.device.type == "cpu" or (number + 1) % self.EVERY == 0:
            self.check()

    def check(self) -> None:
        """Raises NonFiniteLossError if any loss of the epoch so far was not finite."""
        first, state = int(self.first), self.trainer.state
        if first < 0:
            return
        samples = ", ".join(map(str, self.trainer.loader.indices(state.round, state.epoch, first)))
        raise NonFiniteLossError(
            f"the loss is not a finite number in round {state.round}, epoch {state.epoch + 1}, step {first + 1}, at a "
            f"learning rate of {state.optimizer.param_groups[0]['lr']:g}, for the training images {samples}; lower "
            "--base-lr, check these images, or skip such batches with --on-nonfinite skip; the last checkpoint "
            "is from before"
        )

    def check_weights(self) -> None:
        """Raises NonFiniteLossError if a weight is not finite, which is possible although all losses were finite."""
        state = self.trainer.state
        if not torch.stack([parameter.isfinite().all() for parameter in state.network.parameters()]).all():
            raise NonFiniteLossError(
                f"the network's weights are not finite numbers after round {state.round}, epoch {state.epoch + 1}, "
                f"step {state.step}, at a learning rate of {state.optimizer.param_groups[0]['lr']:g}; lower --base-lr; "
                "the last checkpoint is from before"
            )


def _restore(buffers: Iterable[torch.Tensor], before: Iterable[torch.Tensor]) -> None:
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
