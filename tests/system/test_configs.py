"""Each config trains one step with its own command, on synthetic files in the format of its data set."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

import main
import synthetic
from lib.config.parser import read_options
from lib.training import trainer
from lib.training.optim import build_schedule
from lib.training.recorder import Recorder
from lib.training.setup import RunContext

CONFIGS = Path(__file__).parents[2] / "configs"
PARTS = {"cifar10-cpu", "cifar10", "cifar100", "svhn", "stl10", "imagenet", "cub200", "dogs", "folder", "digits"}


def make(name: str, root: Path) -> None:
    """A few images of a data set, as its archives unpack."""
    if name in ("cifar10", "cifar100"):
        synthetic.cifar(root, classes=int(name.removeprefix("cifar")))
    elif name == "svhn":
        synthetic.svhn(root)
    elif name == "stl10":
        synthetic.stl10(root, images=10, unlabelled=10)
    elif name == "cub200":
        synthetic.cub200(root, classes=4)
    elif name == "dogs":
        synthetic.dogs(root, classes=4)
    elif name == "imagenet":
        synthetic.imagenet(root, flat=True)
    elif name == "folder":
        synthetic.imagenet(root)


def command_of(config: Path) -> list[str]:
    """The option files of the command in a config's header."""
    found = re.search(r"^# Command: +python main\.py --cfgs (.*)$", config.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, config
    return [word for word in found[1].split() if word.endswith(".yaml")]


EXPERIMENTS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "base.yaml")


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_each_config_trains_one_step_with_its_command(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = command_of(config)
    assert files[-1] == f"configs/{config.name}"
    name = next(part for part in sorted(PARTS, key=len, reverse=True) if config.stem.startswith(part))
    name = {"cifar10-cpu": "folder"}.get(name, name)  # the same images as files
    make(name, tmp_path)
    synthetic.accept(monkeypatch, tmp_path)
    monkeypatch.chdir(CONFIGS.parent)
    records: list[dict[str, Any]] = []
    losses: list[Any] = []
    loss_of = trainer.batch_loss
    monkeypatch.setattr(Recorder, "epoch_finished", lambda self, record, accuracy: records.append(record))
    monkeypatch.setattr(
        trainer, "batch_loss", lambda *words, **more: losses.append((found := loss_of(*words, **more))[0]) or found
    )
    seen: list[RunContext] = []
    train = main.train
    monkeypatch.setattr(main, "train", lambda context: seen.append(context) or train(context))
    samples = {"imagenet": 12, "folder": 12, "cub200": 8, "dogs": 8, "digits": 1437}.get(name, 20)
    views = read_options(["--cfgs", *files]).views
    words = f"--data-root {tmp_path} --batch-size {samples * views} --workers-num 0 --debug --seed 1"
    words += " --max-round 1 --max-epoch 1"
    assert main.main(["--cfgs", *files, *words.split()]) == 0
    (context,), (record,), loss = seen, records, losses[-1]  # the rehearsal may also call the loss
    assert context.options.dataset == name and len(context.splits.train) == samples
    assert context.splits.test is not None and context.splits.test.labels is not None
    pixels = context.options.size if isinstance(context.options.size, int) else context.options.size[0]
    (images, _), *_ = context.loader(context.splits.train, train=True).epoch()
    assert images.shape == (samples * views, 3, pixels, pixels)
    expected = {"imagenet": 224, "cub200": 224, "dogs": 224, "stl10": 96, "digits": 8, "folder": 32}.get(name, 32)
    assert pixels == (16 if config.stem.startswith("cifar10-cpu") else expected)
    assert record["loss"] == pytest.approx(loss.item()) and math.isfinite(loss.item())
    assert 0 <= record["top1"] <= 1


def test_base_config_has_the_options_of_the_paper() -> None:
    """These options have other defaults, namely those of the reference."""
    options = read_options(["--cfgs", str(CONFIGS / "base.yaml")])
    assert (options.optimizer, options.base_lr, options.momentum, options.nesterov) == ("sgd", 0.03, 0.9, True)
    assert (options.weight_decay, options.batch_size, options.max_round, options.max_epoch) == (5e-4, 128, 5, 200)
    rate = build_schedule(options)
    assert [rate(epoch) for epoch in (0, 119, 120, 159, 160, 199)] == pytest.approx(
        [0.03] * 2 + [0.003] * 2 + [3e-4] * 2
    )


def test_every_data_set_of_the_paper_has_a_config() -> None:
    small = {f"{name}{network}" for name in ("cifar10", "cifar100", "svhn") for network in ("", "-alexnet")}
    large = {"imagenet-alexnet", "imagenet-resnet18", "cub200", "dogs"}
    assert {path.stem for path in EXPERIMENTS} == small | large | {
        "digits",
        "folder",
        "cifar10-cpu",
        "cifar10-cpu-plus",
        "cifar10-plus",
        "stl10",
    }
