"""What a run is at the end of an epoch, written to a file and read back. Layer 3.

A checkpoint has the reference's form: ``net``, ``optimizer``, ``ANs_discovery``, ``npc``, ``acc`` (share of
right answers of this state), ``epoch`` (next to run), ``round``, ``session``; and beside it what going on
exactly takes: ``best_acc`` of the round so far, ``seed``, ``history`` (the figures of each round) and
``network`` (the backbone's name). It holds tensors and plain containers only and is read as such.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lib.console import UsageError
from lib.memory_bank import MemoryBank
from lib.neighbourhoods import Neighbourhoods
from lib.session import LATEST

Checkpoint = dict[str, Any]

TRAINING_KEYS = ("net", "optimizer", "ANs_discovery", "npc", "epoch", "round")


@dataclass
class TrainingState:
    """All that training changes.

    Attributes:
        network: images (B, 3, H, W) -> embeddings (B, D).
        optimizer: over the network's parameters.
        bank: N rows.
        neighbourhoods: of the current round.
        seed: of the whole run.
        round, epoch: next to run; epoch == the epochs of a round: the round is done.
        acc: accuracy after the last epoch, None without labels.
        best_acc: best of the round so far.
        history: the figures of each round's last epoch so far.
    """

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    bank: MemoryBank
    neighbourhoods: Neighbourhoods
    seed: int
    round: int = 0
    epoch: int = 0
    acc: float | None = None
    best_acc: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def checkpoint(self, network_name: str, session: str) -> Checkpoint:
        """Everything, as tensors and plain containers."""
        return {
            "net": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ANs_discovery": self.neighbourhoods.state_dict(),
            "npc": self.bank.state_dict(),
            "acc": self.acc,
            "epoch": self.epoch,
            "round": self.round,
            "session": session,
            "best_acc": self.best_acc,
            "seed": self.seed,
            "history": self.history,
            "network": network_name,
        }

    def restore(self, loaded: Checkpoint, where: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            UsageError: it lacks a part, or is of another network, embedding size or number of samples.
        """
        lacking = [key for key in TRAINING_KEYS if key not in loaded]
        if lacking:
            raise UsageError(
                f"{where}: lacks {', '.join(lacking)}, which training needs; only --test-only does without"
            )
        load_network(self.network, loaded, where)
        device = self.bank.memory.device
        try:
            check_bank(loaded, tuple(self.bank.memory.shape), where)
            self.bank.load_state_dict(loaded["npc"])
            self.neighbourhoods = Neighbourhoods.from_state_dict(loaded["ANs_discovery"], device)
            load_optimizer(self.optimizer, loaded["optimizer"], where)
            self.round, self.epoch = int(loaded["round"]), int(loaded["epoch"])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UsageError(f"{where}: its parts do not fit together: {_first_line(error)}") from None
        self.acc, self.best_acc = loaded.get("acc"), loaded.get("best_acc", loaded.get("acc"))
        self.history = list(loaded.get("history", []))


def save(content: Checkpoint, path: Path) -> None:
    """Writes beside ``path``, flushes to the disk, and renames: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def locate(resume: Path) -> Path:
    """The checkpoint file that ``--resume`` means: itself, or the latest of a session's folder."""
    path = resume / "checkpoint" / LATEST if resume.is_dir() else resume
    if not path.is_file():
        raise UsageError(f"{path}: no such checkpoint; pass --resume a .ckpt file or a session's folder")
    return path


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint, tensors and plain containers only, onto the CPU.

    Raises:
        UsageError: the file is damaged, holds anything else, or is no checkpoint of this kind.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = "holds more than tensors and plain containers" if "WeightsUnpickler" in str(error) else "is damaged"
        raise UsageError(f"{path}: {what}, and is not opened: {_first_line(error)}") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        damaged = zipfile.is_zipfile(path) or path.read_bytes()[:2] == b"PK"
        what = "is damaged or cut short" if damaged else "is no PyTorch checkpoint"
        raise UsageError(f"{path}: {what} ({_first_line(error)}); choose another checkpoint") from None
    if not isinstance(content, dict) or not isinstance(content.get("net"), dict):
        raise UsageError(f"{path}: is not a checkpoint of this program: it holds no 'net'")
    return content


def load_network(network: torch.nn.Module, loaded: Checkpoint, where: Path) -> None:
    """Puts ``net`` into the network; ``module.`` prefixes of multi-GPU training are bridged.

    Raises:
        UsageError: it is of another network or embedding size; says which.
    """
    inner = network.module if isinstance(network, torch.nn.DataParallel) else network
    state = {name.removeprefix("module."): value for name, value in loaded["net"].items()}
    own = inner.state_dict()
    if state.keys() != own.keys():
        name = f"network {loaded['network']}" if "network" in loaded else "another network"
        first = min(state.keys() ^ own.keys())
        side = "which the checkpoint lacks" if first in own else "which only the checkpoint has"
        raise UsageError(f"{where}: is of {name}, not of the one chosen by --network (they differ in {first}, {side})")
    for name, value in own.items():
        there = tuple(getattr(state[name], "shape", ()))
        if there == tuple(value.shape):
            continue
        if name == "linear.weight" and len(there) == 2 and there[1] == value.shape[1]:
            raise UsageError(f"{where}: has embedding size {there[0]}, not {value.shape[0]}; set --low-dim to it")
        raise UsageError(f"{where}: is of another network: {name} is {list(there)} there and {list(value.shape)} here")
    inner.load_state_dict(state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], where: Path) -> None:
    """Takes over what the optimiser has gathered (momentum); learning rate, decay and so on stay the options'.

    Raises:
        UsageError: it is of another kind of optimiser.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    kinds = {"nesterov", "betas", "alpha"}  # of SGD, Adam, RMSprop; other keys come and go between versions
    if any(
        kinds & mine.keys() != kinds & theirs.keys() for mine, theirs in zip(own, state["param_groups"], strict=True)
    ):
        raise UsageError(f"{where}: was trained with another optimiser; set --optimizer to it")
    optimizer.load_state_dict(state)
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group.update(mine)


def check_bank(loaded: Checkpoint, shape: tuple[int, ...], where: Path) -> None:
    """Raises UsageError where the memory bank is of another number of samples or embedding size."""
    there = tuple(loaded["npc"]["memory"].shape)
    if there[:1] != shape[:1]:
        raise UsageError(
            f"{where}: was trained on {there[0]} samples, not {shape[0]}; choose the data it was trained on"
        )
    if there != shape:
        raise UsageError(f"{where}: its memory bank has embedding size {there[1]}, not {shape[1]}; set --low-dim to it")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
