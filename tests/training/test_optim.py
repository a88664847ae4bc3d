"""Learning rates by epoch, the file of a multistep schedule, and the optimisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lib.config.options import Options
from lib.errors import UsageError
from lib.training.optim import (
    build_optimizer,
    build_schedule,
    epoch_of_span,
    fixed,
    multistep,
    read_rates,
    set_learning_rate,
    step,
)

many = settings(max_examples=50, deadline=None)
rates = st.floats(1e-6, 10)


# Schedules.


@given(rates, st.integers(0, 1000))
@many
def test_fixed_learning_rate_is_constant(base: float, epoch: int) -> None:
    assert fixed(base)(epoch) == base


@given(rates, st.integers(0, 300), st.integers(0, 200), st.integers(1, 80), st.sampled_from([0.1, 0.5, 1.0, 0.94]))
@many
def test_step_schedule_equals_the_oracle(base: float, epoch: int, offset: int, every: int, rate: float) -> None:
    expected = oracles.step_rate(base, epoch, offset=offset, every=every, rate=rate)
    assert step(base, offset=offset, every=every, rate=rate)(epoch) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_of_the_paper_first_drops_at_epoch_120() -> None:
    rate = step(0.03, offset=80, every=40, rate=0.1)
    rates = [rate(epoch) for epoch in (0, 79, 80, 119, 120, 159, 160, 199, 200)]
    assert rates == pytest.approx([0.03, 0.03, 0.03, 0.03, 3e-3, 3e-3, 3e-4, 3e-4, 3e-5])


@given(st.dictionaries(st.integers(1, 60), rates, max_size=5), rates, st.integers(0, 80))
@many
def test_multistep_schedule_equals_the_oracle(changes: dict[int, float], first: float, epoch: int) -> None:
    changes = {**changes, 0: first}  # not in the order of the epochs
    assert multistep(changes)(epoch) == oracles.multistep_rate(list(changes.items()), epoch)


# The file of a multistep schedule.


def written(folder: Path, text: str) -> Path:
    path = folder / "rates.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_schedule_file_may_have_comments_and_any_number_format(tmp_path: Path) -> None:
    path = written(tmp_path, "# rates\n0: 0.03\n120: 0.003   # lower\n160: 3e-4\n180: 3.0e-5\n190: 1\n")
    assert read_rates(path) == {0: 0.03, 120: 0.003, 160: 3e-4, 180: 3e-5, 190: 1.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("- 0.1\n- 0.01\n", "mapping"),
        ("0.1\n", "mapping"),
        ("0: [0.1\n", "YAML"),
        ("10: 0.1\n", "epoch 0"),
        ("0: 0.1\n-5: 0.01\n", "-5"),
        ("0: 0.1\n1.5: 0.01\n", "1.5"),
        ("0: 0.1\nlater: 0.01\n", "later"),
        ("0: 0.1\n5: slow\n", "slow"),
        ("0: 0\n", "greater than 0"),
        ("0: -0.1\n", "-0.1"),
        ("0: .inf\n", "finite"),
        ("0: 1e39\n", "less than"),
        ("0: .nan\n", "nan"),
        ("0:\n", "None"),
        ("0: [0.1, 0.2]\n", "0.1, 0.2"),
    ],
)
def test_invalid_schedule_file_is_refused_with_its_name(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as refusal:
        read_rates(path)
    assert str(path) in str(refusal.value)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_schedule_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: no such file"):
        read_rates(tmp_path / "nowhere.yaml")


def test_schedule_file_errors_do_not_mention_option_files(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", written(tmp_path, ""), written(tmp_path, "- 1\n")):
        with pytest.raises(UsageError) as refusal:
            read_rates(path)
        assert "--cfgs" not in str(refusal.value)
        assert "'option: value'" not in str(refusal.value)


# From options.


def test_lr_policy_selects_the_schedule(tmp_path: Path) -> None:
    epochs = range(12)
    options: dict[str, Any] = {"base_lr": 0.2, "lr_decay_offset": 3, "lr_decay_step": 4, "lr_decay_rate": 0.5}

    rate = build_schedule(Options(**options))
    expected = [oracles.step_rate(0.2, epoch, offset=3, every=4, rate=0.5) for epoch in epochs]
    assert [rate(epoch) for epoch in epochs] == pytest.approx(expected)
    assert len(set(expected)) == 3

    rate = build_schedule(Options(**options, lr_policy="fixed"))
    assert {rate(epoch) for epoch in epochs} == {0.2}

    path = written(tmp_path, "7: 0.01\n0: 0.4\n")
    rate = build_schedule(Options(**options, lr_policy="multistep", lr_schedule=path))
    assert [rate(epoch) for epoch in epochs] == [0.4] * 7 + [0.01] * 5


def test_cosine_schedule_equals_pytorch() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    rate = build_schedule(Options(base_lr=0.3, lr_policy="cosine", max_epoch=10))
    for epoch in range(10):
        assert rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("policy", ["cosine", "fixed", "step"])
def test_warm_up_is_linear_and_the_schedule_follows_it(policy: str) -> None:
    options: dict[str, Any] = {"base_lr": 0.5, "max_epoch": 12, "lr_decay_step": 6, "lr_policy": policy}
    rate = build_schedule(Options(**options, lr_warmup_epochs=4))
    assert [rate(epoch) for epoch in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    if policy == "cosine":  # after the warm-up, a full cosine schedule over the remaining epochs
        alone = build_schedule(Options(**{**options, "max_epoch": 8}))
        assert [rate(epoch) for epoch in range(4, 12)] == [alone(epoch) for epoch in range(8)]
    else:
        alone = build_schedule(Options(**options))
        assert [rate(epoch) for epoch in range(4, 12)] == [alone(epoch) for epoch in range(4, 12)]


def test_lr_span_run_does_not_restart_the_schedule_each_round() -> None:
    for span, expected in {"round": [0, 1, 2] * 3, "run": list(range(9))}.items():
        options = Options(max_round=3, max_epoch=3, lr_span=span, lr_policy="cosine", lr_warmup_epochs=1)
        assert [epoch_of_span(options, round, epoch) for round in range(3) for epoch in range(3)] == expected
        last = build_schedule(options)(options.schedule_epochs - 1)
        assert 0 < last < 0.51 * options.base_lr and options.schedule_epochs == max(expected) + 1


def test_step_schedule_without_lr_decay_step_is_constant() -> None:
    """The reference divides by zero with this default."""
    rate = build_schedule(Options(base_lr=0.2, max_epoch=1000))
    assert {rate(epoch) for epoch in range(1000)} == {0.2}


@pytest.mark.parametrize("epochs", [3, 20])  # beyond float32, and beyond Python's own numbers
def test_overflowing_learning_rate_is_refused_at_the_start(epochs: int) -> None:
    growing: dict[str, Any] = {"lr_decay_rate": 1e30, "lr_decay_offset": 0, "lr_decay_step": 1}
    build_schedule(Options(**growing, max_epoch=2))
    with pytest.raises(UsageError, match="lr-decay-rate"):
        build_schedule(Options(**growing, max_epoch=epochs))


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([[3.0]]))]


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "dampening": 0.0, "nesterov": True, "weight_decay": 0.01}),
        ("sgd", torch.optim.SGD, {"momentum": 0.7, "dampening": 0.25, "nesterov": False, "weight_decay": 0.02}),
        ("adam", torch.optim.Adam, {"weight_decay": 0.03}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.6, "weight_decay": 0.04}),
        ("rmsprop", torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-6, "centered": True}),
        ("adam", torch.optim.Adam, {"eps": 1e-6, "amsgrad": True}),
    ],
)
def test_optimiser_receives_the_values_of_the_options(
    name: str, kind: type[torch.optim.Optimizer], values: dict[str, Any]
) -> None:
    own = parameters()
    optimizer = build_optimizer(Options(optimizer=name, base_lr=0.05, **values), own)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in values} == values
    assert group["lr"] == 0.05
    assert [id(p) for p in group["params"]] == [id(p) for p in own]


def test_adam_receives_beta1_and_beta2() -> None:
    (group,) = build_optimizer(Options(optimizer="adam", beta1=0.7, beta2=0.8), parameters()).param_groups
    assert group["betas"] == (0.7, 0.8)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_optimiser_defaults_equal_those_of_pytorch(name: str) -> None:
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[name]
    (ours,) = build_optimizer(Options(optimizer=name, momentum=0.0, weight_decay=0.0), parameters()).param_groups
    (plain,) = kind(parameters(), lr=0.1).param_groups
    assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in plain.items() if k != "params"}


def test_two_steps_of_nesterov_sgd_follow_the_formula() -> None:
    momentum, decay, lr = 0.9, 0.1, 0.5
    own = parameters()
    optimizer = build_optimizer(
        Options(base_lr=lr, momentum=momentum, nesterov=True, weight_decay=decay, optimizer="sgd"), own
    )
    value, velocity = 3.0, 0.0
    for gradient in (2.0, -1.0):
        own[1].grad = torch.tensor([[gradient]])
        optimizer.step()
        slope = gradient + decay * value
        velocity = momentum * velocity + slope
        value -= lr * (slope + momentum * velocity)
    assert own[1].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_set_learning_rate_changes_every_parameter_group(name: str) -> None:
    optimizer = build_optimizer(Options(optimizer=name), parameters())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 3.0})
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_step_uses_the_learning_rate_that_was_set() -> None:
    own = parameters()
    optimizer = build_optimizer(Options(momentum=0, weight_decay=0, base_lr=1.0), own)
    set_learning_rate(optimizer, 0.25)
    own[1].grad = torch.tensor([[4.0]])
    optimizer.step()
    assert own[1].item() == 2.0
