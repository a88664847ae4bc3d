"""Gradients summed by DistributedDataParallel during the backward pass equal those summed after it.

The tests use gloo on CPUs. The program overlaps the two on GPUs only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn.parallel import DistributedDataParallel

import models
from lib.config.options import Options
from lib.distributed import data_parallel, device
from lib.distributed.data_parallel import GradientSum
from lib.distributed.processes import Ranks
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.session.run_folder import Session
from lib.training import optim
from lib.training.checkpoint import TrainingState
from lib.training.recorder import Recorder
from lib.training.trainer import Trainer
from team import Team

CPU = torch.device("cpu")
SAMPLES, LOW_DIM = 27, 6


class Batches:
    """Batches of this rank's images in a fixed order. The last batch has three images, so some ranks have none."""

    def __init__(self, ranks: Ranks, size: int, nan_batch: int | None) -> None:
        draw = torch.Generator().manual_seed(5)
        self.images = torch.randn(SAMPLES, 3, 16, 16, generator=draw)
        self.ranks, self.parts = ranks, torch.arange(SAMPLES).split(size)
        if nan_batch is not None:
            self.images[self.parts[nan_batch][0]] = torch.nan

    def __len__(self) -> int:
        return len(self.parts)

    def epoch(self, round: int = 0, epoch: int = 0, first: int = 0) -> Any:
        for part in self.parts[first:]:
            yield self.images[part[self.ranks.slice_in(self.ranks.local_batch_sizes(len(part)))]], part

    def indices(self, round: int, epoch: int, batch: int) -> list[int]:
        return self.parts[batch].tolist()


def epoch_of(ranks: Ranks, overlapping: tuple[str, ...], size: int, nan_batch: int | None, changes: Any) -> Any:
    """One epoch: network, momentum and bank, the skipped batches, and the number of sums after the backward pass."""
    torch.manual_seed(0)
    network = device.place(models.build("resnet10-w16", low_dim=LOW_DIM), CPU, ranks, sync_bn=True)
    bank = MemoryBank(SAMPLES, LOW_DIM, temperature=0.2, momentum=0.5, seed=1, device="cpu", ranks=ranks)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    state = TrainingState(network, optimizer, bank, Neighbourhoods.none(SAMPLES), 5)
    if changes.get("amp") == "fp16":
        state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    after = 0

    def counted(parameters: Any) -> None:
        nonlocal after
        after += 1
        Ranks.all_reduce_gradients(ranks, parameters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "OVERLAPPING", overlapping)
        patch.setattr(ranks, "all_reduce_gradients", counted)
        options = Options(network="resnet10-w16", **changes)
        recorder = Recorder(Session(None), options)
        trainer = Trainer(options, state, Batches(ranks, size, nan_batch), optim.fixed(0.01), recorder, ranks=ranks)
        optim.set_learning_rate(optimizer, 0.01)
        trainer.train_steps()
    momentum = [value["momentum_buffer"] for value in optimizer.state.values()]
    values = [*network.state_dict().values(), *momentum, bank.memory]
    return [value.clone() for value in values], state.skipped, after


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (8, {}),
        (12, {"iter_size": 2}),
        (6, {"iter_size": 3}),
        (8, {"amp": "bf16"}),
        (8, {"amp": "fp16", "iter_size": 2}),
    ],
    ids=str,
)
def test_gradient_sums_during_backward_equal_those_after_it(size: int, changes: Any, team: Team) -> None:
    after = team.run(epoch_of, (), size, None, changes)
    during = team.run(epoch_of, ("cpu",), size, None, changes)
    steps = after[0][2]
    assert steps > 1 and all(answer[2] == 1 for answer in during)  # only the first step sums after the backward pass
    for ours, theirs in zip(during, after, strict=True):
        for one, other in zip(ours[0], theirs[0], strict=True):
            assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nan_batch", [0, 1, 2])
def test_skippable_batches_sum_gradients_after_the_backward_pass(nan_batch: int, team: Team) -> None:
    """The NaN is in the first or the last batch of a step, or in the next step."""
    changes = {"on_nonfinite": "skip", "iter_size": 2}
    after = team.run(epoch_of, (), 7, nan_batch, changes)
    during = team.run(epoch_of, ("cpu",), 7, nan_batch, changes)
    for ours, theirs in zip(during, after, strict=True):
        assert ours[1:] == theirs[1:] == (1, 2)
        assert all(map(torch.equal, ours[0], theirs[0]))


class Unused(torch.nn.Module):
    """A network with parameters that receive no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def summed_over_steps(ranks: Ranks, overlapping: tuple[str, ...]) -> Any:
    torch.manual_seed(0)
    network = Unused()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "OVERLAPPING", overlapping)
        gradients = GradientSum(network, ranks, may_skip=False)
    for step in range(3):
        network.zero_grad()
        with gradients.batch(is_last=True) as wrapped:
            wrapped(torch.full((2, 3), float(ranks.rank + step))).sum().backward()
        gradients.finish()
    assert network.used.weight.grad is not None
    return network.used.weight.grad, isinstance(wrapped, DistributedDataParallel)


def test_unused_parameters_are_summed_after_the_backward_pass(team: Team) -> None:
    """DistributedDataParallel would refuse the second step."""
    answers = team.run(summed_over_steps, ("cpu",))
    expected = sum(2.0 * (rank + 2) for rank in range(len(answers)))
    for gradient, is_wrapped in answers:
        assert not is_wrapped and torch.equal(gradient, torch.full((2, 3), expected))
