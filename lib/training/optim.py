"""Optimisers and learning rate schedules.

The schedule restarts in every round, as in the reference, or covers the whole run (``--lr-span``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError

from lib.config.options import Options
from lib.config.parser import read_yaml
from lib.errors import UsageError

Schedule = Callable[[int], float]
"""Epoch within the span of the schedule (a round, or the run), from 0 -> learning rate."""

LIMIT = 2.0**128
"""Upper limit of float32, in which the optimiser computes."""


def fixed(base_lr: float) -> Schedule:
    """A constant learning rate."""
    return lambda epoch: base_lr


def step(base_lr: float, *, offset: int, every: int, rate: float) -> Schedule:
    """base_lr * rate ** ((epoch - offset) // every) from ``offset`` on, base_lr before.

    The first decay is at epoch offset + every, as in the reference. With ``every`` 0, for which the reference divides
    by zero, there is no decay.
    """
    if every == 0:
        return fixed(base_lr)
    return lambda epoch: base_lr * rate ** (max(epoch - offset, 0) // every)


def multistep(rates: dict[int, float]) -> Schedule:
    """The rate of the last change at or before the epoch; ``rates`` maps epochs to rates and contains epoch 0."""
    return lambda epoch: rates[max(change for change in rates if change <= epoch)]


def cosine(base_lr: float, epochs: int) -> Schedule:
    """base_lr (1 + cos(pi epoch / epochs)) / 2: half a cosine over ``epochs`` epochs, without restarts.

    Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5.
    """
    return lambda epoch: base_lr * (1 + math.cos(math.pi * min(max(epoch, 0) / epochs, 1))) / 2


def warmed_up(schedule: Schedule, epochs: int) -> Schedule:
    """The schedule times (epoch + 1) / (epochs + 1) in its first ``epochs`` epochs."""
    return lambda epoch: schedule(epoch) * min(1, (epoch + 1) / (epochs + 1))


def epoch_of_span(options: Options, round: int, epoch: int) -> int:
    """The epoch of the schedule: within the round, or with ``--lr-span run`` within the run."""
    return epoch + (round * options.max_epoch if options.lr_span == "run" else 0)


def read_rates(path: Path) -> dict[int, float]:
    """Reads a multistep schedule: a YAML file with a line ``epoch: learning rate`` for each change.

        0: 0.03
        120: 0.003   # from epoch 120 on
        160: 3e-4

    Raises:
        UsageError: the file is missing or not such a mapping, or epoch 0 is missing.
    """
    entry = TypeAdapter(dict[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0, lt=LIMIT, allow_inf_nan=False)]])
    try:
        rates = entry.validate_python(read_yaml(path, "epoch: learning rate"))
    except ValidationError as failure:
        error = failure.errors()[0]
        raise UsageError(
            f"{path}: must contain lines 'epoch: learning rate'; {error['input']!r} is invalid: {error['msg']}"
        ) from None
    if 0 not in rates:
        raise UsageError(f"{path}: epoch 0 is missing; add a line '0: learning rate'")
    return rates


def build_schedule(options: Options) -> Schedule:
    """The schedule of ``lr_policy`` after ``lr_warmup_epochs``.

    Raises:
        UsageError: the schedule file is invalid, or the learning rate overflows.
    """
    schedule = _policy(options)
    return warmed_up(schedule, options.lr_warmup_epochs) if options.lr_warmup_epochs else schedule


def _policy(options: Options) -> Schedule:
    if options.lr_policy == "multistep":
        assert options.lr_schedule is not None  # checked by Options
        return multistep(read_rates(options.lr_schedule))
    if options.lr_policy == "fixed":
        return fixed(options.base_lr)
    if options.lr_policy == "cosine":
        falls = cosine(options.base_lr, options.schedule_epochs - options.lr_warmup_epochs)
        return lambda epoch: falls(epoch - options.lr_warmup_epochs)
    rates = step(
        options.base_lr, offset=options.lr_decay_offset, every=options.lr_decay_step, rate=options.lr_decay_rate
    )
    try:
        is_usable = rates(options.schedule_epochs - 1) < LIMIT
    except OverflowError:
        is_usable = False
    if not is_usable:
        raise UsageError(
            f"--lr-decay-rate {options.lr_decay_rate:g}: the learning rate overflows before epoch "
            f"{options.schedule_epochs}; set it to 1 or less"
        )
    return rates


def build_optimizer(options: Options, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """SGD, Adam or RMSprop over all parameters. Weight decay applies to all of them, too.

    On a GPU a step of SGD or Adam is one fused kernel: launching one for each parameter takes longer than computing.
    On a CPU it is not fused, which would change the last bits.
    """
    parameters = list(parameters)
    common: dict[str, Any] = {"lr": options.base_lr, "weight_decay": options.weight_decay}
    if options.optimizer != "rmsprop" and all(parameter.is_cuda for parameter in parameters):
        common["fused"] = True  # PyTorch has no fused RMSprop
    if options.optimizer == "adam":
        betas = options.beta1, options.beta2
        return torch.optim.Adam(parameters, betas=betas, eps=options.eps, amsgrad=options.amsgrad, **common)
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            parameters,
            momentum=options.momentum,
            alpha=options.alpha,
            eps=options.eps,
            centered=options.centered,
            **common,
        )
    return torch.optim.SGD(
        parameters, momentum=options.momentum, dampening=options.dampening, nesterov=options.nesterov, **common
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
