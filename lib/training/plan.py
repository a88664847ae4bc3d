"""What the curriculum does, and whom it works with. Letters: N samples, K neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lib.config.options import Options
from lib.data.loader import Loader
from lib.distributed.device import PRECISIONS
from lib.distributed.processes import World
from lib.distributed.signals import Interrupts
from lib.errors import UsageError
from lib.evaluation.classifier import Evaluator
from lib.method.neighbourhoods import Neighbourhoods
from lib.session.run_folder import Session
from lib.training import optim


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
    learning_rate: optim.Schedule
    display_freq: int
    autocast: torch.dtype | None = None
    ckpt_every: int = 0
    skip_nonfinite: bool = False


def build_plan(options: Options, learning_rate: optim.Schedule, samples: int, processes: int = 1) -> Plan:
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
