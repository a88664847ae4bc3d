"""Learning rate by epoch, and the optimiser it drives.

The schedule starts again in every round (docs/method.md, equation 9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError

from lib.config.options import Options
from lib.config.parser import read_yaml
from lib.errors import UsageError

Schedule = Callable[[int], float]
"""Epoch within the round, from 0 -> learning rate."""

LIMIT = 2.0**128
"""Where float32 ends, in which the optimiser steps."""


def fixed(base_lr: float) -> Schedule:
    """The same rate in every epoch."""
    return lambda epoch: base_lr


def step(base_lr: float, *, offset: int, every: int, rate: float) -> Schedule:
    """base_lr * rate ** ((epoch - offset) // every) from ``offset`` on, base_lr before.

    The first drop therefore comes at epoch offset + every, as in the reference. ``every`` 0, by which the reference
    divides, means no drops.
    """
    if every == 0:
        return fixed(base_lr)
    return lambda epoch: base_lr * rate ** (max(epoch - offset, 0) // every)


def multistep(rates: dict[int, float]) -> Schedule:
    """The rate of the last change at or before the epoch; ``rates`` maps epochs to rates and has epoch 0."""
    return lambda epoch: rates[max(change for change in rates if change <= epoch)]


def read_rates(path: Path) -> dict[int, float]:
    """The file of a multistep schedule: YAML, a line ``epoch: learning rate`` for each change.

        0: 0.03
        120: 0.003   # from epoch 120 on
        160: 3e-4

    Raises:
        UsageError: the file is missing, no such mapping, or says nothing about epoch 0.
    """
    entry = TypeAdapter(dict[Annotated[int, Field(ge=0)], Annotated[float, Field(gt=0, lt=LIMIT, allow_inf_nan=False)]])
    try:
        rates = entry.validate_python(read_yaml(path, "epoch: learning rate"))
    except ValidationError as failure:
        error = failure.errors()[0]
        raise UsageError(
            f"{path}: should hold lines 'epoch: learning rate', but {error['input']!r} does not fit: {error['msg']}"
        ) from None
    if 0 not in rates:
        raise UsageError(f"{path}: says nothing about epoch 0; add a line '0: learning rate'")
    return rates


def build_schedule(options: Options) -> Schedule:
    """The schedule of ``lr_policy``."""
    if options.lr_policy == "multistep":
        assert options.lr_schedule is not None  # Options saw to it
        return multistep(read_rates(options.lr_schedule))
    if options.lr_policy == "fixed":
        return fixed(options.base_lr)
    rates = step(
        options.base_lr, offset=options.lr_decay_offset, every=options.lr_decay_step, rate=options.lr_decay_rate
    )
    try:
        is_usable = rates(options.max_epoch - 1) < LIMIT
    except OverflowError:
        is_usable = False
    if not is_usable:
        raise UsageError(
            f"--lr-decay-rate {options.lr_decay_rate:g}: the learning rate grows beyond all numbers until epoch "
            f"{options.max_epoch}; set it to 1 or less"
        )
    return rates


def build_optimizer(options: Options, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """SGD, Adam or RMSprop over all parameters, weight decay included."""
    common: dict[str, Any] = {"lr": options.base_lr, "weight_decay": options.weight_decay}
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
    """The rate for every parameter from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
