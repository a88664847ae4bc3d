"""Checkpoints: the format of the reference, exact restore, and files that are no checkpoints."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrained import legacy_bytes, python2

import models
from lib.errors import UsageError
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.session import locate
from lib.session.console import logger
from lib.training import checkpoint, pretrained
from lib.training.checkpoint import TrainingState

SAMPLES, LOW_DIM = 12, 4


class Small(torch.nn.Module):
    """A small network with the parameter names of the reference's ResNets."""

    def __init__(self, low_dim: int = LOW_DIM, width: int = 6) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, width, 3)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.linear = torch.nn.Linear(width, low_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.bn1(self.conv1(x)))
        return torch.nn.functional.normalize(self.linear(maps.mean(dim=(2, 3))), dim=1)


def optimizer_of(network: torch.nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(network.parameters(), lr=0.1)
    if kind == "rmsprop":
        return torch.optim.RMSprop(network.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def state_of(
    seed: int = 1, *, low_dim: int = LOW_DIM, width: int = 6, samples: int = SAMPLES, kind: str = "sgd", steps: int = 0
) -> TrainingState:
    torch.manual_seed(seed)
    network = Small(low_dim, width)
    optimizer = optimizer_of(network, kind)
    bank = MemoryBank(samples, low_dim, temperature=0.07, momentum=0.4, seed=seed, device="cpu")
    state = TrainingState(network, optimizer, bank, Neighbourhoods.none(samples), seed)
    for _ in range(steps):
        step(state)
    return state


def step(state: TrainingState) -> None:
    images = torch.linspace(-1, 1, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5)
    index = torch.arange(4)
    state.optimizer.zero_grad()
    embeddings = state.network(images)
    torch.nn.functional.cross_entropy(embeddings @ state.bank.memory.t() / 0.1, index).backward()
    state.optimizer.step()
    state.bank.update(embeddings.detach(), index)


def neighbourhoods_of(k: int, consistency: float | None = None) -> Neighbourhoods:
    """Anchors 5, 2 and 9 of twelve samples, each with k neighbours."""
    anchors = torch.tensor([5, 2, 9])
    instances = torch.tensor([0, 1, 3, 4, 6, 7, 8, 10, 11])
    position = torch.tensor([-1, -2, 1, -3, -4, 0, -5, -6, -7, 2, -8, -9])
    neighbours = torch.tensor([[6, 7, 0], [3, 11, 10], [8, 1, 4]])[:, :k]
    return Neighbourhoods(anchors, instances, position, neighbours, torch.linspace(0, 2, SAMPLES), consistency)


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, containers included."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def written(folder: Path, content: Any, name: str = "a.ckpt", **how: Any) -> Path:
    torch.save(content, folder / name, **how)
    return folder / name


def refusal(path: Path) -> str:
    """The error message of ``load``; any other exception propagates."""
    with pytest.raises(UsageError) as refused:
        checkpoint.load(path)
    text = str(refused.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_checkpoint_has_types_and_shapes_of_the_reference() -> None:
    state = state_of(steps=1)
    state.neighbourhoods = neighbourhoods_of(2, 0.5)
    state.acc, state.epoch, state.round = 0.25, 3, 2
    content = state.checkpoint("small", "mine")
    assert set(content) >= {"net", "optimizer", "ANs_discovery", "npc", "acc", "epoch", "round", "session"}
    assert set(content["net"]) == set(Small().state_dict())
    assert set(content["optimizer"]) == {"state", "param_groups"}
    assert len(content["optimizer"]["state"]) == 6
    assert all("momentum_buffer" in entry for entry in content["optimizer"]["state"].values())
    found = content["ANs_discovery"]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in found.items()} == {
        "samples_num": (torch.int64, ()),
        "anchor_indexes": (torch.int64, (3,)),
        "instance_indexes": (torch.int64, (9,)),
        "position": (torch.int64, (12,)),
        "neighbours": (torch.int64, (3, 2)),
        "entropy": (torch.float32, (12,)),
        "consistency": (torch.float32, ()),
    }
    assert int(found["samples_num"]) == 12 and float(found["consistency"]) == 0.5
    assert found["anchor_indexes"].tolist() == [5, 2, 9] and found["neighbours"].tolist() == [[6, 7], [3, 11], [8, 1]]
    assert content["npc"]["params"].tolist() == pytest.approx([0.07, 0.4])
    assert content["npc"]["memory"].shape == (12, 4) and content["npc"]["memory"].dtype == torch.float32
    assert (content["acc"], content["epoch"], content["round"], content["session"]) == (0.25, 3, 2, "mine")


def test_checkpoint_file_has_the_content_of_the_reference(tmp_path: Path) -> None:
    network = models.build("resnet18", low_dim=128)
    bank = MemoryBank(SAMPLES, 128, temperature=0.1, momentum=0.5, seed=0, device="cpu")
    state = TrainingState(
        network, optimizer_of(network), bank, neighbourhoods_of(1, 0.5), 0, round=1, epoch=3, acc=0.25
    )
    checkpoint.save(state.checkpoint("resnet18", "mine"), tmp_path / "0001-00003.ckpt")
    content = torch.load(tmp_path / "0001-00003.ckpt", weights_only=True)
    kinds = {"acc": float, "epoch": int, "round": int, "session": str}
    parts = ["net", "optimizer", "ANs_discovery", "npc", *kinds]
    assert list(content)[: len(parts)] == parts and {name: type(content[name]) for name in kinds} == kinds
    assert isinstance(content["net"], dict) and len(content["net"]) == 122
    shapes = {name: tuple(value.shape) for name, value in content["net"].items()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3) and shapes["layer1.1.conv2.weight"] == (64, 64, 3, 3)
    assert shapes["layer4.0.shortcut.0.weight"] == (512, 256, 1, 1) and shapes["layer4.0.shortcut.1.bias"] == (512,)
    assert shapes["linear.weight"] == (128, 512) and shapes["linear.bias"] == (128,)
    types = {value.dtype for name, value in content["net"].items() if not name.endswith("num_batches_tracked")}
    assert types == {torch.float32} and content["net"]["bn1.num_batches_tracked"].dtype == torch.int64
    assert set(content["optimizer"]) == {"state", "param_groups"}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in content["ANs_discovery"].items()} == {
        "samples_num": (torch.int64, ()),
        "anchor_indexes": (torch.int64, (3,)),
        "instance_indexes": (torch.int64, (9,)),
        "position": (torch.int64, (12,)),
        "neighbours": (torch.int64, (3, 1)),
        "entropy": (torch.float32, (12,)),
        "consistency": (torch.float32, ()),
    }
    assert {name: (value.dtype, tuple(value.shape)) for name, value in content["npc"].items()} == {
        "params": (torch.float32, (2,)),
        "memory": (torch.float32, (12, 128)),
    }


def test_parameters_have_the_names_of_the_reference() -> None:
    network = models.build("resnet10", low_dim=8)
    optimizer = optimizer_of(network)
    bank = MemoryBank(3, 8, temperature=0.1, momentum=0.5, seed=0, device="cpu")
    names = set(TrainingState(network, optimizer, bank, Neighbourhoods.none(3), 0).checkpoint("", "")["net"])
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = {"conv1.weight", *(f"bn1.{part}" for part in norm), "linear.weight", "linear.bias"}
    for layer in range(1, 5):
        block = f"layer{layer}.0"
        expected |= {f"{block}.conv{i}.weight" for i in (1, 2)} | {f"{block}.bn{i}.{p}" for i in (1, 2) for p in norm}
        if layer > 1:
            expected |= {f"{block}.shortcut.0.weight", *(f"{block}.shortcut.1.{part}" for part in norm)}
    assert names == expected


def test_no_anchors_before_the_first_discovery() -> None:
    found = state_of().checkpoint("small", "")["ANs_discovery"]
    assert found["anchor_indexes"].shape == (0,) and found["neighbours"].shape[0] == 0
    assert found["instance_indexes"].tolist() == list(range(12))
    assert math.isnan(found["consistency"])


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop"])
def test_state_is_restored_bit_for_bit(k: int, kind: str, tmp_path: Path) -> None:
    state = state_of(1, kind=kind, steps=3)
    if k:
        state.neighbourhoods = neighbourhoods_of(k, 1 / 3)
    state.round, state.epoch, state.acc, state.best_acc = 2, 7, 1 / 3, 0.7
    state.history = [{"round": 0, "loss": 0.1, "top1": None}, {"round": 1, "loss": 2.5, "top1": 0.5}]
    before = copy.deepcopy(state.checkpoint("small", "mine"))
    path = tmp_path / "a.ckpt"
    checkpoint.save(state.checkpoint("small", "mine"), path)

    raw = torch.load(path, weights_only=True)
    assert same({**before, "ANs_discovery": 0}, {**raw, "ANs_discovery": 0})

    again = state_of(2, kind=kind)
    assert not torch.equal(again.bank.memory, state.bank.memory)
    again.restore(checkpoint.load(path), path, embed=unexpected_embed)
    assert same(again.network.state_dict(), before["net"])
    assert same(again.optimizer.state_dict(), before["optimizer"])
    assert same(again.bank.memory, before["npc"]["memory"])
    for name in ("anchors", "instances", "position", "neighbours", "entropy"):
        assert same(getattr(again.neighbourhoods, name), getattr(state.neighbourhoods, name)), name
    assert again.neighbourhoods.consistency == (pytest.approx(1 / 3) if k else None)
    assert (again.round, again.epoch, again.acc, again.best_acc) == (2, 7, 1 / 3, 0.7)
    assert again.history == state.history

    step(state)
    step(again)  # the next step is equal, too
    assert same(again.network.state_dict(), state.network.state_dict())
    assert same(again.bank.memory, state.bank.memory)


def test_restore_keeps_learning_rate_and_decay_of_the_options() -> None:
    before = state_of(steps=1).checkpoint("small", "")
    now = state_of(2)
    now.optimizer.param_groups[0].update(lr=0.5, weight_decay=0.0, momentum=0.8)
    now.restore(before, Path("a.ckpt"), embed=unexpected_embed)
    group = now.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.0, 0.8)
    assert same(now.optimizer.state_dict()["state"], before["optimizer"]["state"])


def published(prefix: str = "module.") -> dict[str, Any]:
    """A checkpoint as the reference writes it, with optimiser state of PyTorch 1.0."""
    state = state_of(5, steps=2)
    state.neighbourhoods = neighbourhoods_of(1, 0.5)
    content = copy.deepcopy(state.checkpoint("small", ""))
    groups = content["optimizer"]["param_groups"]
    ids = [140_000 + 8 * number for number in range(6)]
    buffers = [entry["momentum_buffer"] for entry in content["optimizer"]["state"].values()]
    kept = {name: groups[0][name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}
    return {
        "net": {prefix + name: value for name, value in content["net"].items()},
        "optimizer": {
            "state": {i: {"momentum_buffer": value} for i, value in zip(ids, buffers, strict=True)},
            "param_groups": [{**kept, "params": ids}],
        },
        "ANs_discovery": content["ANs_discovery"],
        "npc": content["npc"],
        "acc": 0.5,
        "epoch": 4,
        "round": 2,
        "session": "2019-05-04",
    }


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "the reference's format"])
def test_checkpoint_of_the_reference_resumes(prefix: str, zipped: bool, tmp_path: Path) -> None:
    content = published(prefix)
    path = written(tmp_path, content, _use_new_zipfile_serialization=zipped)
    state = state_of(2)
    state.restore(checkpoint.load(path), path, embed=unexpected_embed)
    assert same(
        dict(state.network.state_dict()), {name.removeprefix("module."): v for name, v in content["net"].items()}
    )
    buffers = [entry["momentum_buffer"] for entry in content["optimizer"]["state"].values()]
    assert same([entry["momentum_buffer"] for entry in state.optimizer.state_dict()["state"].values()], buffers)
    assert (state.round, state.epoch, state.acc, state.best_acc, state.history) == (2, 4, 0.5, 0.5, [])
    twin = state_of(5, steps=2)
    step(twin)
    step(state)
    assert same(state.network.state_dict(), twin.network.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoint_of_the_python_2_reference_resumes(prefix: str, tmp_path: Path) -> None:
    """PyTorch 1.0 named parameters by their addresses, integers that Python 2 pickled as text."""
    content = published(prefix)
    ids = [140_250_000_000_000 + 8 * i for i in content["optimizer"]["param_groups"][0]["params"]]
    content["optimizer"]["param_groups"][0]["params"] = ids
    content["optimizer"]["state"] = dict(zip(ids, content["optimizer"]["state"].values(), strict=True))
    content["net"] = {name: value for name, value in content["net"].items() if "num_batches_tracked" not in name}
    path = tmp_path / "0002-00003.ckpt"
    path.write_bytes(python2(legacy_bytes(content)))
    assert b"I1402500" in path.read_bytes()
    state, twin = state_of(2), state_of(5, steps=2)
    state.restore(checkpoint.load(path), path, embed=unexpected_embed)
    assert (state.round, state.epoch, state.acc) == (2, 4, 0.5)
    assert torch.equal(state.neighbourhoods.anchors, torch.tensor([5, 2, 9]))
    step(twin)
    step(state)
    parameters = zip(state.network.parameters(), twin.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in parameters)
    assert torch.equal(state.bank.memory, twin.bank.memory)


def test_gpu_checkpoint_has_module_prefix_and_resumes_anywhere() -> None:
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    for network in ("resnet18", "imagenet-resnet18"):
        assert checkpoint.saved_name("conv1.weight", network, gpu) == "module.conv1.weight"
    for network in ("alexnet", "alexnet-small"):
        assert checkpoint.saved_name("features.0.weight", network, gpu) == "features.module.0.weight"
        assert checkpoint.saved_name("classifier.0.weight", network, gpu) == "classifier.0.weight"
        assert checkpoint.saved_name("features.0.weight", network, cpu) == "features.0.weight"
    plain, other = state_of(1), state_of(2)
    content = other.checkpoint("small", "")
    content["net"] = {"module." + name: value for name, value in content["net"].items()}
    checkpoint.load_network(plain.network, content, Path("a.ckpt"))
    assert same(dict(plain.network.state_dict()), dict(other.network.state_dict()))


def unexpected_embed() -> torch.Tensor:
    raise AssertionError("the checkpoint has a memory bank")


def restore_refusal(content: dict[str, Any], state: TrainingState | None = None) -> str:
    """The error message of ``restore``; any other exception propagates."""
    with pytest.raises(UsageError) as refused:
        (state or state_of()).restore(content, Path("a.ckpt"), embed=unexpected_embed)
    text = str(refused.value)
    assert text.startswith("a.ckpt: ") and "\n" not in text
    return text


def test_checkpoint_of_another_network_is_refused() -> None:
    content = state_of().checkpoint("small", "")
    content["net"] = models.build("resnet10", low_dim=LOW_DIM).state_dict()
    content["network"] = "resnet10"
    text = restore_refusal(content)
    assert "resnet10" in text and "--network" in text
    del content["network"]
    assert "another network" in restore_refusal(content)


def test_wider_network_is_refused_with_the_first_difference() -> None:
    text = restore_refusal(state_of(width=7).checkpoint("small", ""))
    assert "another network" in text and "conv1.weight" in text and "[7, 3, 3, 3]" in text and "[6, 3, 3, 3]" in text


def test_other_embedding_size_is_refused_with_both_sizes() -> None:
    text = restore_refusal(state_of(low_dim=9).checkpoint("small", ""))
    assert "embedding size 9, not 4" in text and "--low-dim" in text


def test_bank_of_other_embedding_size_is_refused_with_both_sizes() -> None:
    content = state_of().checkpoint("small", "")
    content["npc"] = state_of(low_dim=9).checkpoint("small", "")["npc"]
    text = restore_refusal(content)
    assert "embedding size 9, not 4" in text and "--low-dim" in text


@pytest.mark.parametrize("there", [11, 13, 1])
def test_other_number_of_samples_is_refused_with_both_numbers(there: int) -> None:
    assert f"{there} samples, not 12" in restore_refusal(state_of(samples=there).checkpoint("small", ""))


def test_neighbourhoods_of_another_number_of_samples_are_refused() -> None:
    content = state_of().checkpoint("small", "")
    content["ANs_discovery"] = Neighbourhoods.none(5).state_dict()
    restore_refusal(content)


@pytest.mark.parametrize("name", ["anchor_indexes", "instance_indexes", "position", "neighbours"])
@pytest.mark.parametrize(
    "damage",
    [lambda table: table.float(), lambda table: table + 50, lambda table: table[:-1]],
    ids=["floats", "beyond", "short"],
)
def test_neighbourhoods_with_invalid_indices_are_refused(name: str, damage: Callable[..., torch.Tensor]) -> None:
    state = state_of()
    state.neighbourhoods = neighbourhoods_of(2)
    content = state.checkpoint("small", "")
    content["ANs_discovery"][name] = damage(content["ANs_discovery"][name])
    restore_refusal(content)


@pytest.mark.parametrize(("there", "here"), [("adam", "sgd"), ("sgd", "adam"), ("rmsprop", "sgd"), ("adam", "rmsprop")])
def test_checkpoint_of_another_optimiser_is_refused(there: str, here: str) -> None:
    text = restore_refusal(state_of(kind=there, steps=1).checkpoint("small", ""), state_of(kind=here))
    assert "--optimizer" in text


def restored_without(*parts: str) -> tuple[TrainingState, dict[str, Any]]:
    """A state restored from a checkpoint of the reference (round 2, after epoch 3) without some of its keys."""
    content = {name: value for name, value in published("").items() if name not in parts}
    state = state_of(2)
    state.restore(content, Path("a.ckpt"), embed=lambda: EMBEDDINGS)
    assert same(dict(state.network.state_dict()), content["net"])
    return state, content


EMBEDDINGS = torch.nn.functional.normalize(torch.linspace(-1, 2, SAMPLES * LOW_DIM).reshape(SAMPLES, LOW_DIM), dim=1)


def test_missing_memory_bank_is_filled_with_embeddings() -> None:
    state, _ = restored_without("npc")
    assert torch.equal(state.bank.memory, EMBEDDINGS)
    assert (state.round, state.epoch) == (2, 4) and torch.equal(state.neighbourhoods.anchors, torch.tensor([5, 2, 9]))


def test_momentum_starts_at_zero_without_optimiser_state() -> None:
    state, content = restored_without("optimizer")
    assert not state.optimizer.state and torch.equal(state.bank.memory, content["npc"]["memory"])


@pytest.mark.parametrize("empty", [True, False])
def test_round_restarts_without_neighbourhoods(empty: bool) -> None:
    state, content = restored_without("ANs_discovery")
    if empty:
        no_neighbours = {name: torch.zeros(0) for name in published("")["ANs_discovery"]}
        state.restore({**content, "epoch": 4, "ANs_discovery": no_neighbours}, Path("a.ckpt"), embed=unexpected_embed)
    assert (state.round, state.epoch) == (2, 0) and state.neighbourhoods.num_anchors == 0


def test_empty_reference_buffers_are_accepted() -> None:
    content = {**published(""), "round": 0}
    content["ANs_discovery"] = {
        **Neighbourhoods.none(SAMPLES).state_dict(),
        "neighbours": torch.zeros(0, dtype=torch.long),
    }
    state = state_of(2)
    state.restore(content, Path("a.ckpt"), embed=unexpected_embed)
    assert (state.round, state.epoch) == (0, 4) and state.neighbourhoods.num_anchors == 0
    assert len(state.neighbourhoods.position) == SAMPLES


def test_round_without_anchors_resumes_at_its_epoch() -> None:
    """A small share can select no anchor at all. The discovery is still complete and is not repeated."""
    before = state_of()
    before.neighbourhoods, before.round, before.epoch = Neighbourhoods.none(SAMPLES), 1, 3
    state = state_of(2)
    state.restore(before.checkpoint("small", ""), Path("a.ckpt"), embed=unexpected_embed)
    assert (state.round, state.epoch) == (1, 3)


def test_missing_bank_is_filled_by_the_restored_network() -> None:
    content = {"net": published("")["net"]}
    state, seen = state_of(2), []

    def embed() -> torch.Tensor:
        seen.append(copy.deepcopy(dict(state.network.state_dict())))
        return EMBEDDINGS

    state.restore(content, Path("a.ckpt"), embed=embed)
    assert len(seen) == 1 and same(seen[0], content["net"])


def test_failed_embedding_does_not_blame_the_checkpoint() -> None:
    def embed() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        state_of(2).restore({"net": published("")["net"]}, Path("a.ckpt"), embed=embed)


def test_matching_weights_of_another_file_are_loaded(tmp_path: Path) -> None:
    theirs = {f"backbone.{name}": value for name, value in published("")["net"].items() if name != "linear.bias"}
    path = written(tmp_path, {"state_dict": theirs, "epoch": 90, "round": 7})
    state = state_of(2)
    bias = state.network.linear.bias.detach().clone()
    state.restore(checkpoint.load(path), path, embed=lambda: EMBEDDINGS)
    own = state.network.state_dict()
    assert all(torch.equal(own[name.removeprefix("backbone.")], value) for name, value in theirs.items())
    assert torch.equal(state.network.linear.bias, bias)
    assert (state.round, state.epoch) == (0, 0) and torch.equal(state.bank.memory, EMBEDDINGS)


def test_weights_that_mostly_do_not_match_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {"state_dict": models.build("resnet10", low_dim=LOW_DIM).state_dict()})
    with pytest.raises(UsageError, match="only 1 of the network's 8 tensors"):
        checkpoint.load_network(Small(), checkpoint.load(path), path)


def test_checkpoint_of_a_run_must_match_completely() -> None:
    content = published("")
    del content["net"]["linear.bias"]
    assert "linear.bias" in restore_refusal(content)


@pytest.mark.parametrize("part", ["round", "epoch", "acc", "session"])
def test_missing_counters_start_at_zero(part: str) -> None:
    state, content = restored_without(part)
    assert (state.round, state.epoch) == (content.get("round", 0), content.get("epoch", 0))
    assert state.acc == content.get("acc")


def test_checkpoint_with_a_network_only_starts_at_round_0() -> None:
    state, _ = restored_without("npc", "optimizer", "ANs_discovery", "acc", "epoch", "round", "session")
    assert (state.round, state.epoch, state.acc, state.best_acc, state.history) == (0, 0, None, None, [])
    assert torch.equal(state.bank.memory, EMBEDDINGS)


@pytest.mark.parametrize("part", ["npc", "optimizer", "ANs_discovery"])
def test_missing_parts_are_logged(part: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger(), "propagate", True)
    with caplog.at_level("INFO", logger=logger().name):
        restored_without(part)
    words = {"npc": "memory bank", "optimizer": "optimiser", "ANs_discovery": "neighbourhoods"}
    assert words[part] in caplog.text and "a.ckpt" in caplog.text


def test_missing_batch_counters_of_old_files_are_accepted() -> None:
    content = published("")
    content["net"] = {name: value for name, value in content["net"].items() if "num_batches_tracked" not in name}
    state = state_of(2)
    state.restore(content, Path("a.ckpt"), embed=unexpected_embed)
    assert same({name: state.network.state_dict()[name] for name in content["net"]}, content["net"])


@pytest.mark.parametrize("value", [None, 5, "x", [], {}, torch.zeros(2)], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("part", ["optimizer", "ANs_discovery", "npc"])
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_part_of_the_wrong_type_is_refused(part: str, value: Any) -> None:
    restore_refusal({**state_of().checkpoint("small", ""), part: value})


@pytest.mark.parametrize("value", [None, "x", [], float("nan"), float("inf"), torch.zeros(2)], ids=repr)
@pytest.mark.parametrize("part", ["epoch", "round"])
def test_count_that_is_not_a_number_is_refused(part: str, value: Any) -> None:
    restore_refusal({**state_of().checkpoint("small", ""), part: value})


@pytest.mark.parametrize("shape", [(12,), (), (12, 4, 1), (12, 1), (0, 4)])
def test_memory_bank_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    content = state_of().checkpoint("small", "")
    content["npc"] = {**content["npc"], "memory": torch.zeros(shape)}
    text = restore_refusal(content)
    assert "4, not 4" not in text and "12 samples, not 12" not in text


def test_invalid_history_is_refused() -> None:
    restore_refusal({**state_of().checkpoint("small", ""), "history": None})


@pytest.mark.parametrize("name", ["bn1.num_batches_tracked", "linear.bias", "conv1.weight"])
@pytest.mark.parametrize("value", [None, 5, "x"])
def test_parameter_that_is_not_a_tensor_is_refused(name: str, value: Any) -> None:
    content = state_of().checkpoint("small", "")
    content["net"] = {**content["net"], name: value}
    restore_refusal(content)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(LOW_DIM, dtype=torch.long),
        torch.zeros(LOW_DIM, dtype=torch.complex64),
        torch.zeros(LOW_DIM).to_sparse(),
        torch.zeros(LOW_DIM, device="meta"),
    ],
    ids=str,
)
def test_parameter_of_another_dtype_or_layout_is_refused(value: torch.Tensor) -> None:
    content = state_of().checkpoint("small", "")
    content["net"] = {**content["net"], "linear.bias": value}
    assert "linear.bias" in restore_refusal(content)


def test_parameters_without_names_are_refused() -> None:
    restore_refusal({**state_of().checkpoint("small", ""), "net": {0: torch.zeros(1)}})


def test_momentum_of_another_shape_is_refused() -> None:
    content = copy.deepcopy(state_of(steps=1).checkpoint("small", ""))
    content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(1, 2)
    restore_refusal(content)


CONTENT = {
    "net": {"a": torch.arange(3.0), "b": torch.zeros(2, 2)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "acc": 0.5,
    "epoch": 3,
    "session": "mine",
}


def bytes_of(content: Any, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_truncated_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    whole = bytes_of(CONTENT, zipped)
    path = tmp_path / "a.ckpt"
    for length in [*range(30), *range(30, len(whole), 13 if zipped else 1)]:
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_truncated_file_is_refused_in_one_sentence(zipped: bool, share: float, tmp_path: Path) -> None:
    whole = bytes_of(published(), zipped)
    path = tmp_path / "a.ckpt"
    path.write_bytes(whole[: int(share * len(whole))])
    assert_plain_sentence(refusal(path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")
def test_file_with_a_damaged_byte_is_read_or_refused(zipped: bool, tmp_path: Path) -> None:
    whole = bytes_of(CONTENT, zipped)
    path = tmp_path / "a.ckpt"
    for place in range(0, len(whole), 3 if zipped else 1):
        for flip in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= flip
            path.write_bytes(bytes(damaged))
            try:
                checkpoint.load(path)
            except UsageError as refused:
                assert str(refused).startswith(f"{path}: ")


def test_damaged_byte_in_a_saved_checkpoint_is_always_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint.save(CONTENT, path)
    whole = path.read_bytes()
    for place in [
        *range(0, len(whole) - pretrained.CHECKSUM_SIZE, 7),
        *range(len(whole) - pretrained.CHECKSUM_SIZE, len(whole)),
    ]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x01
        path.write_bytes(bytes(damaged))
        refusal(path)
    for length in range(len(whole) - pretrained.CHECKSUM_SIZE + 1, len(whole)):
        path.write_bytes(whole[:length])
        refusal(path)


def assert_plain_sentence(text: str) -> None:
    """One plain sentence about the file, without PyTorch's advice to load it with ``weights_only=False``."""
    assert 10 < len(text) < 500 and text.isprintable()
    assert "weights_only" not in text and "Re-running" not in text and "torch.load" not in text


def empty_zip() -> bytes:
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    return file.getvalue()


def other_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes/a.txt", "no tensors")
    return file.getvalue()


NOT_CHECKPOINTS = {
    "nothing": b"",
    "one byte": b"\x80",
    "text": b"no checkpoint\n",
    "random bytes": bytes((i * i * 31 + 7 * i) % 256 for i in range(3000)),
    "zeros": bytes(3000),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "an empty zip": empty_zip(),
    "another zip": other_zip(),
    "a zip's first bytes": b"PK\x03\x04" + bytes(50),
    "a pickle": pickle.dumps({"net": {}}, protocol=4),
}


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_file_that_is_not_a_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(NOT_CHECKPOINTS[kind])
    refusal(path)


@pytest.mark.parametrize("kind", NOT_CHECKPOINTS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_file_that_is_not_a_checkpoint_gives_one_sentence(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(NOT_CHECKPOINTS[kind])
    text = refusal(path)
    assert_plain_sentence(text)
    assert "other than tensors" not in text or kind == "a pickle"  # a damaged file is not reported as unsafe


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [1, 2], None, 5, {}, {"weights": {}}, {"net": [1]}, {"net": None}],
    ids=lambda content: str(content).replace(" ", ""),
)
def test_tensor_file_that_is_not_a_checkpoint_is_refused(content: Any, tmp_path: Path) -> None:
    text = refusal(written(tmp_path, content))
    assert_plain_sentence(text)
    assert "no weights" in text


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("place", ["net", "history", "whole"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "sealed", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_file_with_code_is_refused_and_not_run(kind: str, place: str, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    content: Any = Evil(proof) if place == "whole" else {**CONTENT, place: Evil(proof)}
    path = tmp_path / "a.ckpt"
    with path.open("wb") as file:
        file.write(pickle.dumps(content) if kind == "pickle" else bytes_of(content, kind == "zip"))
        if kind == "sealed":
            pretrained.append_checksum(file)  # a checksum does not make the file safe
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert proof.is_dir()  # the code does run if the file is trusted
    proof.rmdir()
    refusal(path)
    assert not proof.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_file_with_code_gives_one_sentence(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(bytes_of({**CONTENT, "history": Evil(tmp_path / "executed")}, zipped))
    text = refusal(path)
    assert_plain_sentence(text)
    assert "other than tensors and plain containers" in text


def test_reading_a_checkpoint_gives_no_warning(tmp_path: Path) -> None:
    for zipped in (True, False):
        path = written(tmp_path, published(), _use_new_zipfile_serialization=zipped)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoint.load(path)["session"] == "2019-05-04"


def test_save_replaces_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for epoch in (1, 2):
        checkpoint.save({**CONTENT, "epoch": epoch}, path)
        assert checkpoint.load(path)["epoch"] == epoch
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("broken"), KeyboardInterrupt()])
def test_failed_save_keeps_the_earlier_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint.save(CONTENT, path)
    before = path.read_bytes()

    def fail(content: Any, file: Any, *arguments: Any, **more: Any) -> None:
        if hasattr(file, "write"):
            file.write(b"half")
        else:
            Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(error)):
        checkpoint.save({**CONTENT, "epoch": 9}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    checkpoint.save({**CONTENT, "epoch": 9}, path)  # despite leftover temporary files
    assert checkpoint.load(path)["epoch"] == 9


def test_resume_accepts_a_file_or_a_session_folder(tmp_path: Path) -> None:
    session = tmp_path / "mine"
    (session / "checkpoint").mkdir(parents=True)
    latest, older = session / "checkpoint" / "latest.ckpt", session / "checkpoint" / "0000-00000.ckpt"
    latest.write_bytes(b"")
    older.write_bytes(b"")
    assert locate.locate(session) == latest
    assert locate.locate(older) == older


@pytest.mark.parametrize("name", ["none.ckpt", "empty", "none/none.ckpt"])
def test_resume_of_a_missing_file_is_refused_with_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="--resume") as refused:
        locate.locate(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)


class TwoParts(torch.nn.Module):
    """With the layer names of AlexNet."""

    def __init__(self, low_dim: int) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
        self.classifier = torch.nn.Sequential(torch.nn.Linear(2, low_dim))


@pytest.mark.parametrize("prefix", ["features.module.", "module.features.", "module.features.module."])
def test_prefixes_of_an_alexnet_trained_on_gpus_are_removed(prefix: str) -> None:
    saved, network = TwoParts(3), TwoParts(3)
    names = {name: name.replace("features.", prefix) for name in saved.state_dict()}
    loaded = {"net": {names[name]: value for name, value in saved.state_dict().items()}}
    checkpoint.load_network(network, loaded, Path("a.ckpt"))
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in network.state_dict().items())


def test_other_embedding_size_is_refused_for_any_layer_name() -> None:
    with pytest.raises(UsageError, match="embedding size 3, not 5"):
        checkpoint.load_network(TwoParts(5), {"net": TwoParts(3).state_dict()}, Path("a.ckpt"))


def test_checkpoint_has_the_legacy_format_of_pytorch(tmp_path: Path) -> None:
    """PyTorch 1.0 cannot read the zip format. It reads pickles of protocol 2 with these names."""
    path = tmp_path / "a.ckpt"
    state = state_of(5, steps=2)
    state.neighbourhoods = neighbourhoods_of(1, 0.5)
    checkpoint.save(state.checkpoint("small", "mine"), path)
    known = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", "torch FloatStorage", "torch LongStorage"}
    with path.open("rb") as file:
        assert not zipfile.is_zipfile(path)
        for _ in range(5):
            codes = list(pickletools.genops(file))
            assert codes[0][0].name == "PROTO" and codes[0][1] == 2
            assert {value for code, value, _ in codes if code.name == "GLOBAL"} <= known
            assert not any(code.name == "STACK_GLOBAL" for code, *_ in codes)


def test_loss_scale_is_restored(tmp_path: Path) -> None:
    saved, restored = state_of(), state_of()
    saved.scaler, restored.scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (256.0, 2.0))
    checkpoint.save(saved.checkpoint("small", ""), tmp_path / "a.ckpt")
    restored.restore(checkpoint.load(tmp_path / "a.ckpt"), tmp_path / "a.ckpt", embed=lambda: torch.zeros(0))
    assert restored.scaler.get_scale() == 256


def test_saved_loss_scale_is_ignored_without_mixed_precision(tmp_path: Path) -> None:
    saved, restored = state_of(), state_of()
    saved.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    checkpoint.save(saved.checkpoint("small", ""), tmp_path / "a.ckpt")
    restored.restore(checkpoint.load(tmp_path / "a.ckpt"), tmp_path / "a.ckpt", embed=lambda: torch.zeros(0))
    assert not restored.scaler.is_enabled()


def test_weights_of_any_memory_format_are_saved_contiguous(tmp_path: Path) -> None:
    state, path = state_of(), tmp_path / "a.ckpt"
    state.network.to(memory_format=torch.channels_last)
    content = state.checkpoint("small", "")
    assert not all(value.is_contiguous() for value in content["net"].values())
    for each in (content, checkpoint.copy_to_host(content)):
        checkpoint.save(each, path)
        saved = checkpoint.load(path)["net"]
        assert all(value.is_contiguous() and torch.equal(value, content["net"][name]) for name, value in saved.items())
