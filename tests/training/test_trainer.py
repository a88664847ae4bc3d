"""The training loop, compared with plain loops."""

from __future__ import annotations

import copy
import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import datasets
from lib.config.options import Options
from lib.distributed.processes import Ranks
from lib.errors import NonFiniteLossError, UsageError
from lib.evaluation.classifier import Accuracy
from lib.method.discovery import discover
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.session.run_folder import Session
from lib.training import build, checkpoint, optim
from lib.training.checkpoint import TrainingState
from lib.training.recorder import Recorder
from lib.training.trainer import Trainer

SAMPLES, PIXELS, LOW_DIM = 22, 12, 5


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(PIXELS, LOW_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear(x).float(), dim=1)


class Batches:
    """Five batches of four and one of two, the same in every epoch."""

    def __init__(self, size: int = 4) -> None:
        draw = torch.Generator().manual_seed(5)
        self.images = torch.randn(SAMPLES, PIXELS, generator=draw)
        self.parts = torch.randperm(SAMPLES, generator=draw).split(size)
        self.asked: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.parts)

    def epoch(self, round: int = 0, epoch: int = 0, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.asked.append((round, epoch))
        return iter([(self.images[part], part) for part in self.parts[first:]])

    def indices(self, round: int, epoch: int, batch: int) -> list[int]:
        return self.parts[batch].tolist()


def state_of(seed: int = 1, lr: float = 0.1) -> TrainingState:
    torch.manual_seed(seed)
    network = Net()
    bank = MemoryBank(SAMPLES, LOW_DIM, temperature=0.1, momentum=0.5, seed=seed, device="cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    return TrainingState(network, optimizer, bank, Neighbourhoods.none(SAMPLES), seed)


class Watched(Recorder):
    """A recorder that keeps its calls."""

    def __init__(self, session: Session | None = None, options: Options | None = None, **more: Any) -> None:
        images = np.zeros((SAMPLES, 8, 8, 3), np.uint8)
        super().__init__(session or Session(None), options or Options(), images=images, **more)
        self.rounds: list[tuple[int, Neighbourhoods, torch.Tensor]] = []
        self.saved: list[bool] = []

    def round_started(self, state: TrainingState) -> None:
        super().round_started(state)
        if state.round:
            self.rounds.append((state.round, state.neighbourhoods, state.bank.memory.clone()))

    def save(self, state: TrainingState, is_best: bool) -> None:
        self.saved.append(is_best)
        super().save(state, is_best)


def trainer_of(
    state: TrainingState, batches: Any = None, *, session: Session | None = None, rate: Any = None, **changes: Any
) -> Trainer:
    """A trainer; ``changes`` are options where ``Options`` has a field of the name, else arguments of ``Trainer``."""
    named = {"max_round": 3, "max_epoch": 2, "ANs_size": 2, "network": "net", "ckpt_interval": 0.0}
    named |= changes
    options = Options(**{name: value for name, value in named.items() if name in Options.model_fields})
    others = {name: value for name, value in changes.items() if name not in Options.model_fields}
    protocol = "judge" if changes.get("evaluate") else ""
    recorder = others.pop("recorder", None) or Watched(session, options, protocol=protocol)
    return Trainer(options, state, batches or Batches(), rate or optim.fixed(0.1), recorder, **others)


def train(state: TrainingState, batches: Batches, **options: Any) -> float:
    """One epoch's steps; the mean loss."""
    trainer_of(state, batches, **options).train_steps()
    state.step = 0  # as at the end of an epoch
    return state.total.item() / max(1, state.seen)


def plain_epoch(state: TrainingState, batches: Batches, rate: float) -> float:
    """An epoch as docs/method.md describes it: softmax over all rows, sum over the neighbourhood, then the update."""
    found = state.neighbourhoods
    losses = []
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    for part in batches.parts:
        state.optimizer.zero_grad()
        x = state.network(batches.images[part])
        p = torch.softmax(x @ state.bank.memory.clone().t() / 0.1, dim=1)
        each = []
        for row, sample in enumerate(part.tolist()):
            inside = [sample]
            if sample in found.anchors.tolist():
                inside += found.neighbours[found.anchors.tolist().index(sample)].tolist()
            each.append(-sum(p[row, j] for j in inside).log())
        (sum(each) / len(each)).backward()
        state.optimizer.step()
        for row, sample in enumerate(part.tolist()):
            mixed = 0.5 * state.bank.memory[sample] + 0.5 * x[row].detach()
            state.bank.memory[sample] = mixed / mixed.norm()
        losses += [loss.item() for loss in each]
    return sum(losses) / len(losses)


class Collapsed(Net):
    """Gives every image the same embedding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(0 * x)


@pytest.mark.parametrize("network", [Net, Collapsed])
def test_collapse_is_warned_of_once(
    network: type[Net], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("and"), "propagate", True)
    state = state_of()
    state.network = network()
    state.optimizer = torch.optim.SGD(state.network.parameters(), lr=0.1)
    trainer_of(state, max_round=2, max_epoch=8, low_dim=LOW_DIM).fit()
    shown_text = [message for message in caplog.messages if message.startswith("warning: ")]
    assert len(shown_text) == (network is Collapsed)
    assert all("round 1, epoch 2: the embeddings seem to have collapsed" in message for message in shown_text)


def test_collapse_warning_is_not_repeated_after_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("and"), "propagate", True)
    for epochs in (8, 9):
        (tmp_path / "config.yaml").touch()
        session = Session.open(tmp_path, "", start=(0, epochs if epochs == 9 else 0), log_file=False, log_tfb=False)
        state = state_of()
        state.network = Collapsed()
        state.optimizer = torch.optim.SGD(state.network.parameters(), lr=0.1)
        changes = {"max_round": 1, "max_epoch": epochs, "low_dim": LOW_DIM}
        recorder = Watched(session, Options(**changes), epochs=session.epochs())
        trainer_of(state, recorder=recorder, **changes).fit()
        session.close()
    assert len([message for message in caplog.messages if message.startswith("warning: ")]) == 1


def test_epoch_equals_a_plain_loop_with_and_without_anchors() -> None:
    ours, plain = state_of(), state_of()
    batches = Batches()
    for epoch in range(3):
        if epoch == 1:
            found = discover(ours.bank.memory, temperature=0.1, anchors=11, size=2)
            ours.neighbourhoods = plain.neighbourhoods = found
        loss = train(ours, batches)
        assert loss == pytest.approx(plain_epoch(plain, batches, 0.1), rel=1e-5)
    torch.testing.assert_close(ours.network.linear.weight, plain.network.linear.weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.bank.memory, plain.bank.memory, rtol=1e-4, atol=1e-6)


def test_anchors_grow_and_schedule_restarts_each_round() -> None:
    rates: list[int] = []
    given = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.15])

    def rate(epoch: int) -> float:
        rates.append(epoch)
        return 0.1

    batches, state = Batches(), state_of()
    trainer = trainer_of(state, batches, rate=rate, evaluate=Judge(lambda: next(given)))
    trainer.fit()
    assert [(round, found.num_anchors) for round, found, _ in trainer.recorder.rounds] == [
        (1, int(22 * 0.25)),
        (2, int(22 * 0.5)),
    ]
    assert rates == [0, 1, 0, 1, 0, 1]
    assert batches.asked == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(row["top1"], row["best_top1"]) for row in state.history] == [(0.4, 0.5), (0.2, 0.3), (0.15, 0.15)]


def test_best_epoch_is_chosen_on_held_out_images_if_any() -> None:
    tests, held_out = iter([0.5, 0.4, 0.3, 0.2, 0.1, 0.15]), iter([0.6, 0.7, 0.7, 0.6, 0.3, 0.2])
    judges = {"evaluate": Judge(lambda: next(tests)), "validate": Judge(lambda: next(held_out))}
    state = state_of()
    trainer = trainer_of(state, **judges, val_fraction=0.1)
    trainer.fit()
    names = ("top1", "val_top1", "best_top1")
    assert [tuple(row[name] for name in names) for row in state.history] == [
        (0.4, 0.7, 0.4),
        (0.2, 0.6, 0.3),
        (0.15, 0.2, 0.1),
    ]
    assert trainer.recorder.saved == [True, True, True, False, True, False]
    assert (state.acc, state.best_acc) == (0.2, 0.3)
    text = trainer.recorder.summary(state.history)
    assert "best: chosen by held-out training images" in text and "held-out last" in text
    assert "best: chosen by the test labels" in trainer_of(state, **judges).recorder.summary(state.history)


def test_last_of_equally_accurate_epochs_is_the_best() -> None:
    tests = iter([0.5, 0.5, 0.3, 0.3, 0.2, 0.1])
    trainer = trainer_of(state_of(), evaluate=Judge(lambda: next(tests)))
    trainer.fit()
    assert trainer.recorder.saved == [True, True, True, True, True, False]


def test_held_out_images_choose_the_best_epoch_without_a_test_set() -> None:
    held_out = iter([0.6, 0.7] * 3)
    state = state_of()
    trainer = trainer_of(state, validate=Judge(lambda: next(held_out)))
    trainer.fit()
    assert all(row["top1"] is None and row["best_top1"] is None for row in state.history)
    assert [row["val_top1"] for row in state.history] == [0.7] * 3 and state.best_acc == 0.7
    assert "top-1" not in trainer.recorder.summary(state.history).splitlines()[0]


class Judge:
    name = "judge"

    def __init__(self, value: Callable[[], float]) -> None:
        self.value = value

    def __call__(self, network: torch.nn.Module, features: torch.Tensor) -> Accuracy:
        return Accuracy(self.value(), 1.0)


def test_discovery_uses_the_bank_at_the_end_of_the_last_round() -> None:
    trainer = trainer_of(state_of())
    trainer.fit()
    assert len(trainer.recorder.rounds) == 2
    for _, found, memory in trainer.recorder.rounds:
        similarity = (memory.double() @ memory.double().t()).fill_diagonal_(-9)
        for anchor, neighbours in zip(found.anchors.tolist(), found.neighbours.tolist(), strict=True):
            assert set(neighbours) == set(similarity[anchor].topk(2).indices.tolist())


def test_consistency_is_the_share_of_neighbours_with_equal_labels() -> None:
    labels = torch.arange(SAMPLES) % 2
    trainer = trainer_of(state_of(), labels=labels)
    trainer.fit()
    for _, found, _ in trainer.recorder.rounds:
        pairs = [(a, n) for a, row in zip(found.anchors, found.neighbours, strict=True) for n in row]
        assert found.consistency == pytest.approx(sum(int(labels[a] == labels[n]) for a, n in pairs) / len(pairs))


def test_iter_size_2_averages_the_gradients_of_two_batches() -> None:
    """Without momentum in the bank (eta 1) the rows stay, so a step over 2 x 4 images equals one over 8."""
    ours, plain = state_of(), state_of()
    ours.bank.momentum = plain.bank.momentum = 1.0
    for state in (ours, plain):
        state.bank.memory = F.normalize(state.bank.memory, dim=1)
    small, large = Batches(4), Batches(8)
    train(ours, small, iter_size=2)
    # the last group has batches of 4 and 2: its loss is the mean of the two batch means, not of the six images
    for images, part in list(large.epoch())[:2]:
        plain.optimizer.zero_grad()
        logits = plain.network(images) @ plain.bank.memory.t() / 0.1
        F.cross_entropy(logits, part).backward()
        plain.optimizer.step()
    plain.optimizer.zero_grad()
    last = [F.cross_entropy(plain.network(x) @ plain.bank.memory.t() / 0.1, i) for x, i in list(small.epoch())[4:]]
    (sum(last) / 2).backward()
    plain.optimizer.step()
    torch.testing.assert_close(ours.network.linear.weight, plain.network.linear.weight, rtol=1e-4, atol=1e-6)


def test_incomplete_last_batch_group_makes_a_step() -> None:
    steps = 0
    state = state_of()
    original = state.optimizer.step

    def counted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return original(*args)

    state.optimizer.step = counted  # type: ignore[method-assign]
    train(state, Batches(), iter_size=4)
    assert steps == 2  # six batches: four and two


def test_training_lowers_the_loss() -> None:
    state = state_of(lr=0.5)
    losses = [train(state, Batches()) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_step_is_close_to_float32(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []
    exact, mixed = state_of(), state_of()
    mixed.network.linear.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    mixed.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=dtype == torch.float16)
    losses = [
        train(exact, Batches()),
        train(mixed, Batches(), amp={torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]),
    ]
    assert set(seen) == {dtype}
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert mixed.network.linear.weight.dtype == mixed.bank.memory.dtype == torch.float32
    torch.testing.assert_close(mixed.network.linear.weight, exact.network.linear.weight, atol=0.02, rtol=0.1)


def test_overflowing_scaled_gradient_skips_the_step() -> None:
    state = state_of()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    before = state.network.linear.weight.detach().clone()
    train(state, Batches(SAMPLES), amp="fp16")
    assert torch.equal(state.network.linear.weight, before)
    assert state.scaler.get_scale() == pytest.approx(5e37)


def with_nan_image(batches: Batches, step: int) -> Batches:
    """The batches with one image of NaN."""
    batches.images[batches.parts[step][1]] = torch.nan
    return batches


def test_nan_loss_error_names_step_learning_rate_and_images() -> None:
    state, batches = state_of(), with_nan_image(Batches(), 2)
    state.round, state.epoch = 1, 4
    with pytest.raises(NonFiniteLossError) as error:
        train(state, batches, max_epoch=9)
    images = ", ".join(map(str, batches.parts[2].tolist()))
    reported = f"round 1, epoch 5, step 3, at a learning rate of 0.1, for the training images {images};"
    assert reported in str(error.value)


def test_nan_loss_leaves_the_last_checkpoint_unchanged(tmp_path: Path) -> None:
    session = Session(tmp_path, log_tfb=False)
    batches = Batches()
    trainer_of(state_of(), batches, session=session, max_round=1, max_epoch=1).fit()
    before = (tmp_path / "checkpoint" / "latest.ckpt").read_bytes()
    with pytest.raises(NonFiniteLossError):
        trainer_of(state_of(), with_nan_image(batches, 5), session=session, max_round=1, max_epoch=1).fit()
    assert (tmp_path / "checkpoint" / "latest.ckpt").read_bytes() == before
    session.close()


@pytest.mark.parametrize("skip", [False, True])
def test_nonfinite_weights_are_never_saved(skip: bool, tmp_path: Path) -> None:
    """The loss of the last step is finite, so only a check of the weights finds it before the next epoch."""
    state = state_of()
    real = state.optimizer.step
    steps = iter(range(len(Batches()) * 2 - 1))

    def overflow(*arguments: Any, **named: Any) -> None:
        real(*arguments, **named)
        if next(steps, None) is None:
            next(state.network.parameters()).data.view(-1)[0] = torch.inf

    state.optimizer.step = overflow  # type: ignore[method-assign]
    session = Session(tmp_path, log_tfb=False)
    trainer = trainer_of(state, session=session, max_round=1, on_nonfinite="skip" if skip else "stop")
    with pytest.raises(NonFiniteLossError, match="weights are not finite numbers after round 0, epoch 2"):
        trainer.fit()
    session.close()
    saved = torch.load(tmp_path / "checkpoint" / "latest.ckpt", weights_only=True)
    assert saved["epoch"] == 1 and all(value.isfinite().all() for value in saved["net"].values())


@pytest.mark.parametrize("iter_size", [1, 2, 6])
def test_nonfinite_batches_are_skipped_on_request_and_counted(iter_size: int) -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(PIXELS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.norm(x))

    state = state_of()
    state.network = Normed()
    state.optimizer = torch.optim.SGD(state.network.parameters(), lr=0.1, momentum=0.9)
    loss = train(state, with_nan_image(Batches(), 2), on_nonfinite="skip", iter_size=iter_size)
    assert state.skipped == 1 and state.seen == SAMPLES - 4
    assert torch.tensor(loss).isfinite() and state.bank.memory.isfinite().all()
    assert all(value.isfinite().all() for value in state.network.state_dict().values())


def test_failed_save_is_retried_at_the_next_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, saved, state = Session(tmp_path, log_tfb=False), checkpoint.save, state_of()
    calls: list[int] = []

    def now_and_then(content: Any, path: Path) -> None:
        calls.append(len(calls))
        if len(calls) in (3, 4, 12):  # both of the second epoch, and the best of the last
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(content, path)

    monkeypatch.setattr(checkpoint, "save", now_and_then)
    trainer = trainer_of(state, session=session)
    trainer.fit()
    assert len(calls) == 13 and "No space left on device" in (trainer.recorder.unsaved or "")
    assert checkpoint.load(tmp_path / "checkpoint" / "latest.ckpt")["epoch"] == 2
    assert checkpoint.load(tmp_path / "checkpoint" / "0000-00000.ckpt")["epoch"] == 2  # written after the third epoch
    session.close()


@pytest.mark.parametrize("stop", range(1, 6))
def test_resume_after_any_epoch_equals_the_uninterrupted_run(stop: int, tmp_path: Path) -> None:
    whole = state_of()
    trainer_of(whole).fit()

    class Stop(Exception):
        pass

    kept: dict[str, Any] = {}

    class Stopping(Watched):
        def save(self, state: TrainingState, is_best: bool) -> None:
            super().save(state, is_best)
            if len(self.saved) == stop:
                kept.update(copy.deepcopy(state.checkpoint("net", "")))
                raise Stop

    with pytest.raises(Stop):
        trainer_of(state_of(), recorder=Stopping(options=Options(ckpt_interval=0))).fit()
    again = state_of(seed=1)
    with torch.no_grad():
        again.network.linear.weight.zero_()
        again.bank.memory.zero_()
    again.restore(kept, tmp_path, embed=lambda: again.bank.memory)
    trainer_of(again).fit()
    assert torch.equal(whole.network.linear.weight, again.network.linear.weight)
    assert torch.equal(whole.bank.memory, again.bank.memory)
    assert torch.equal(whole.neighbourhoods.anchors, again.neighbourhoods.anchors)
    times = {"images_per_s", "train_s", "evaluate_s"}
    for ours, theirs in zip(whole.history, again.history, strict=True):
        assert {k: v for k, v in ours.items() if k not in times} == {k: v for k, v in theirs.items() if k not in times}


def test_summary_without_labels_has_no_accuracy_columns() -> None:
    state = state_of()
    trainer = trainer_of(state)
    trainer.fit()
    text = trainer.recorder.summary(state.history)
    assert text.splitlines()[0].split() == ["round", "anchors", "loss"]
    assert [line.split()[:2] for line in text.splitlines()[2:]] == [["0", "0"], ["1", "5"], ["2", "11"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 23}, ["22 training images", "--batch-size to 22"]),
        ({"ANs_size": 22, "batch_size": 4}, ["--ANs-size 22", "21 or less"]),
    ],
)
def test_too_few_samples_error_names_the_option_to_change(changes: dict[str, int], words: list[str]) -> None:
    images = datasets.ImageSet(np.zeros((SAMPLES, 8, 8, 3), np.uint8))
    context = SimpleNamespace(options=Options(**changes), splits=datasets.Splits(images), ranks=Ranks())
    with pytest.raises(UsageError) as refused:
        build.check_sizes(context)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(("every", "requests"), [(1, 6), (4, 2)])
def test_stop_requests_are_exchanged_every_n_steps(every: int, requests: int) -> None:
    asked: list[int] = []
    trainer = trainer_of(state_of())  # six steps an epoch
    trainer.steps_between_requests = every
    trainer.signals.is_stop_requested = lambda: bool(asked.append(trainer.state.step))  # type: ignore[method-assign,func-returns-value]
    trainer.train_steps()
    assert asked == [*range(every, 6, every), 6] and len(asked) == requests


def test_without_several_gpus_stop_is_checked_every_step() -> None:
    for device, ranks, every in (("cpu", Ranks(0, 2), 1), ("meta", Ranks(), 1)):
        state = state_of()
        state.bank.memory = state.bank.memory.to(device)
        assert trainer_of(state, ranks=ranks).steps_between_requests == every
