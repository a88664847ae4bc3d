"""Optimisers and learning rate schedules.

The schedule restarts in every round, as in the reference: it depends only on the epoch within the round.
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
    """The schedule of ``lr_policy``.

    Raises:
        UsageError: the schedule file is invalid, or the learning rate overflows.
    """
    if options.lr_policy == "multistep":
        assert options.lr_schedule is not None  # checked by Options
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
            f"--lr-decay-rate {options.lr_decay_rate:g}: the learning rate overflows before epoch {options.max_epoch}; "
            "set it to 1 or less"
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
