"""What a run is at the end of an epoch, written to a file and read back.

A checkpoint has the reference's form: ``net``, ``optimizer``, ``ANs_discovery``, ``npc``, ``acc`` (share of
right answers of this state), ``epoch`` (next to run), ``round``, ``session``; and beside it what going on
exactly takes: ``step`` (next to run in the epoch), ``total`` and ``seen`` (sum of the losses so far, and of how
many images), ``best_acc`` of the round so far, ``seed``, ``history`` (the figures of each round), ``health``
(what the next ones compare with), ``scaler`` (of the loss, for fp16) and ``network`` (the backbone's name). It
holds tensors and plain containers only and is read as such. Of a file that lacks parts, such as somebody's weights
alone, what is there is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lib.distributed.consensus import run_on_all_ranks
from lib.distributed.processes import Ranks
from lib.errors import UsageError
from lib.method import diagnostics
from lib.method.memory_bank import MemoryBank
from lib.method.neighbourhoods import Neighbourhoods
from lib.session.atomic_files import atomic_write, hard_link, reason
from lib.session.console import logger
from lib.session.locate import LATEST, PREVIOUS, locate
from lib.training import pretrained

Checkpoint = dict[str, Any]
DISCOVERY = ("ANs_discovery", "epoch", "round", "step")
"""The parts of a checkpoint that tell what the discovery of its round found."""


@dataclass
class TrainingState:
    """All that training changes.

    Attributes:
        network: images (B, 3, H, W) -> embeddings (B, D).
        optimizer: over the network's parameters.
        bank: N rows.
        neighbourhoods: of the current round.
        seed: of the whole run.
        scaler: of the loss, for fp16; does nothing otherwise.
        round, epoch: next to run; epoch == the epochs of a round: the round is done.
        step: next to run in the epoch; the number of steps: the epoch is trained, and not yet judged.
        total, seen: sum of the losses of the epoch so far, a scalar on the device, and of how many images.
        skipped: batches of the epoch that were left out, as their loss was not finite.
        acc: accuracy after the last epoch, None without labels.
        best_acc: best of the round so far.
        history: the figures of each round's last epoch so far.
        health: what the next epoch's health figures compare with; None before the first.
    """

    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    bank: MemoryBank
    neighbourhoods: Neighbourhoods
    seed: int
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    round: int = 0
    epoch: int = 0
    step: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    seen: int = 0
    skipped: int = 0
    acc: float | None = None
    best_acc: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    health: diagnostics.State | None = None

    def checkpoint(self, network_name: str, session: str) -> Checkpoint:
        """Everything, as tensors and plain containers.

        To be called in every process; the memory bank is in the first one's alone.
        """
        device = self.bank.memory.device
        return {
            "net": {
                saved_name(name, network_name, device): value.contiguous()
                for name, value in self.network.state_dict().items()
            },
            "optimizer": self.optimizer.state_dict(),
            "ANs_discovery": self.neighbourhoods.state_dict(),
            "npc": self.bank.state_dict(),
            "acc": self.acc,
            "epoch": self.epoch,
            "round": self.round,
            "session": session,
            "step": self.step,
            "total": self.total,
            "seen": self.seen,
            "skipped": self.skipped,
            "best_acc": self.best_acc,
            "seed": self.seed,
            "history": self.history,
            "scaler": self.scaler.state_dict(),
            "health": None if self.health is None else self.health.state_dict(),
            "network": network_name,
        }

    def restore(self, loaded: Checkpoint, where: Path, *, embed: Callable[[], torch.Tensor]) -> None:
        """Goes on from a checkpoint; what it lacks starts afresh, and the log says so.

        Args:
            loaded: the checkpoint.
            where: its file, for messages.
            embed: embeddings (n, D) of this process's training images, for a checkpoint without memory bank.

        Raises:
            UsageError: it is of another network, embedding size or number of samples, or its parts contradict
                each other.
        """
        load_network(self.network, loaded, where)
        if "npc" not in loaded:
            logger().info("%s: holds no memory bank: it is filled with the training images' embeddings", where)
            self.bank.memory.copy_(embed())
        try:
            if "npc" in loaded:
                load_bank(self.bank, loaded["npc"], where)
            if "optimizer" in loaded:
                load_optimizer(self.optimizer, loaded["optimizer"], where)
            else:
                logger().info("%s: holds no optimiser: its momentum starts at zero", where)
            if loaded.get("scaler") and self.scaler.is_enabled():
                self.scaler.load_state_dict(loaded["scaler"])
            self.round, self.epoch = int(loaded.get("round", 0)), int(loaded.get("epoch", 0))
            self.step, self.seen = int(loaded.get("step", 0)), int(loaded.get("seen", 0))
            self.skipped = int(loaded.get("skipped", 0))
            self.total = torch.as_tensor(loaded.get("total", 0.0), dtype=torch.float32).to(self.bank.memory.device)
            if min(self.round, self.epoch, self.step, self.seen) < 0 or self.total.dim():
                raise ValueError("the round, the epoch or the step is negative, or the loss is no number")
            self._restore_neighbourhoods(loaded, where)
            self.acc, best = (None if loaded.get(key) is None else float(loaded[key]) for key in ("acc", "best_acc"))
            self.best_acc = self.acc if best is None else best
            earlier = loaded.get("health")
            if earlier is not None and earlier["rows"] is None:  # as ``without_copies`` left it
                rows = diagnostics.measured(self.bank.samples).to(self.bank.memory.device)
                earlier = {**earlier, "rows": self.bank.rows.index_select(rows)}
            self.health = (
                None if earlier is None else diagnostics.State.from_state_dict(earlier, self.bank.memory.device)
            )
            self.history = [{**row, "round": int(row["round"])} for row in loaded.get("history", [])]
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError, OverflowError) as error:
            raise UsageError(f"{where}: its parts do not fit together: {reason(error)}") from None

    def _restore_neighbourhoods(self, loaded: Checkpoint, where: Path) -> None:
        """Those of the checkpoint; where it has none, or the reference's empty ones, the round starts again."""
        if "ANs_discovery" in loaded and loaded["ANs_discovery"]["neighbours"].shape != (0,):
            found = Neighbourhoods.from_state_dict(loaded["ANs_discovery"], self.bank.memory.device)
            if len(found.position) != self.bank.samples:
                raise ValueError("the memory bank and the neighbourhoods are of different samples")
            self.neighbourhoods = found
        elif self.round and self.epoch:
            logger().info("%s: holds no neighbourhoods: round %d starts again with a discovery", where, self.round)
            self.epoch = self.step = 0


def saved_name(name: str, network_name: str, device: torch.device) -> str:
    """A parameter's name in a checkpoint: from a GPU with the prefix that the reference writes there, and expects.

    The reference splits the batches of an AlexNet's convolutions alone over GPUs, and of other networks the whole.
    """
    if device.type != "cuda":
        return name
    if network_name.startswith("alexnet"):
        return f"features.module.{rest}" if (rest := name.removeprefix("features.")) != name else name
    return f"module.{name}"


def save(content: Checkpoint, path: Path) -> None:
    """Writes a checkpoint, whole or not at all, with its checksum behind it; the latest becomes the previous one.

    Raises:
        OSError: it cannot be written.
    """
    if path.name == LATEST and path.exists():
        hard_link(path, path.with_name(PREVIOUS))
    with atomic_write(path) as file:
        try:
            # PyTorch 1.0, the reference's, reads no other form
            torch.save(content, file, _use_new_zipfile_serialization=False)
        except RuntimeError as error:
            if "write()" not in str(error):
                raise
            raise OSError(0, str(error)) from None  # PyTorch's word for a full disk
        pretrained.append_checksum(file)


def without_copies(content: Checkpoint) -> Checkpoint:
    """A checkpoint of the end of an epoch without the rows of the memory bank that are in it twice, for ``health``."""
    if content.get("health") is None:
        return content
    return {**content, "health": {**content["health"], "rows": None}}


def save_discovery(content: Checkpoint, path: Path) -> None:
    """Writes what ``discoveries`` reads of a checkpoint: its neighbourhoods, but no network, optimiser or memory bank.

    Raises:
        OSError: it cannot be written.
    """
    save({"net": {}, **{name: content[name] for name in DISCOVERY if name in content}}, path)


def drop_bests(folder: Path, but: Path | None) -> None:
    """Removes the best checkpoints of a session's rounds but one; what their discoveries found stays.

    Raises:
        OSError: a file cannot be written or removed.
    """
    for path in sorted((folder / "checkpoint").glob("[0-9]*.ckpt")):
        if path == but:
            continue
        record = folder / "neighbours" / path.name
        try:
            if not record.exists():
                save_discovery(load(path), record)
            path.unlink()
        except UsageError as error:
            logger().warning("%s; it is not removed", error)


def make_latest(path: Path) -> None:
    """Makes a checkpoint of a session its latest one: what comes after it is of another run, or damaged.

    Otherwise the next save would keep that as the previous one, in place of the one that is gone on from.

    Raises:
        OSError: the file system does not allow it.
    """
    if path.name != LATEST:
        hard_link(path, path.with_name(LATEST))


def load_resumed(resume: Path, ranks: Ranks | None = None) -> tuple[Path, Checkpoint]:
    """What ``--resume`` means, and its content; where a session's latest is damaged, the one before it.

    The first process alone reads, and tells the others; in place of the memory bank these get a table of its shape
    that holds no numbers (device "meta"), as the rows would fill each one's memory.

    Raises:
        UsageError: there is none, or none that can be used; as ``agreement.together``.
    """
    ranks = ranks or Ranks()
    read = run_on_all_ranks(ranks, lambda: _latest_whole(resume) if ranks.is_rank0 else None)
    told = ranks.broadcast_object(read and (read[0], _without_rows(read[1])))
    return read or told


def _without_rows(loaded: Checkpoint) -> Checkpoint:
    if not isinstance(memory := loaded.get("npc", {}).get("memory"), torch.Tensor):
        return loaded
    return {**loaded, "npc": {**loaded["npc"], "memory": memory.to("meta")}}


def _latest_whole(resume: Path) -> tuple[Path, Checkpoint]:
    path = locate(resume)
    previous = path.with_name(PREVIOUS)
    if not resume.is_dir() or path == previous or not previous.is_file():
        return path, load(path)
    try:
        return path, load(path)
    except UsageError as error:
        logger().warning("%s", error)
        logger().warning("going on from the one before it: %s", previous)
        return previous, load(previous)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint, or somebody's weights (as ``weights``), tensors and plain containers only, onto the CPU.

    Raises:
        UsageError: the file is damaged, holds anything else, or no weights, or its memory bank is no table.
    """
    loaded = pretrained.read(path)
    if "npc" in loaded:
        memory = loaded["npc"].get("memory") if isinstance(loaded["npc"], dict) else None
        if not isinstance(memory, torch.Tensor) or memory.layout != torch.strided or memory.is_nested or memory.is_meta:
            raise UsageError(f"{path}: its memory bank is no table of numbers; choose another checkpoint")
    return loaded


def discoveries(folder: Path | None, current: Checkpoint, samples: int) -> list[tuple[int, Neighbourhoods]]:
    """What the discovery of each round found, in order of rounds.

    Args:
        folder: a session's, whose best checkpoints of earlier rounds are read, or what ``save_discovery`` left in
            their place; None: none are.
        current: a checkpoint.
        samples: N.

    Raises:
        UsageError: a checkpoint is damaged, or of other samples.
    """
    # the later take precedence, so a checkpoint over what stands in for it
    paths = (
        [path for kind in ("neighbours", "checkpoint") for path in sorted((folder / kind).glob("[0-9]*.ckpt"))]
        if folder
        else []
    )
    found: dict[int, Neighbourhoods] = {}
    for where, content in [*((path, load(path)) for path in paths), (folder, current)]:
        if "ANs_discovery" not in content:
            continue
        try:
            here = Neighbourhoods.from_state_dict(content["ANs_discovery"])
            if len(here.position) != samples:
                raise UsageError(f"{where}: is of {len(here.position)} samples, not {samples}; choose its data")
            # before its first step a round has those of the round before
            begun = int(content["epoch"]) > 0 or int(content.get("step", 0)) > 0
            if here.num_anchors:
                found[int(content["round"]) - (not begun)] = here
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UsageError(f"{where}: its neighbourhoods cannot be read: {reason(error)}") from None
    return sorted(found.items())


def load_network(network: torch.nn.Module, loaded: Checkpoint, where: Path) -> None:
    """Puts the checkpoint's weights into the network; prefixes of multi-GPU training are bridged.

    A training run's (``net``) must fit wholly, for going on with a part of a run is none; those of a file that is
    no training run are taken as far as they fit.

    Raises:
        UsageError: it is of another network or embedding size, and says which; or it holds NaN or infinite numbers.
    """
    if "net" not in loaded:
        pretrained.load(network, loaded["weights"], where)
        return
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded["net"].items()):
        raise UsageError(f"{where}: its 'net' holds more than tensors by name; choose another checkpoint")
    state = {pretrained.strip_prefix(name): value for name, value in loaded["net"].items()}
    own = network.state_dict()
    for name in own.keys() - state.keys():
        if name.endswith(pretrained.COUNTER):
            state[name] = own[name]  # files from before PyTorch 0.4.1 have none, and nothing depends on them
    if state.keys() != own.keys():
        name = f"network {loaded['network']}" if "network" in loaded else "another network"
        first = min(state.keys() ^ own.keys())
        side = "which the checkpoint lacks" if first in own else "which only the checkpoint has"
        raise UsageError(f"{where}: is of {name}, not of the one chosen by --network (they differ in {first}, {side})")
    head = pretrained.head(network)
    for name, value in own.items():
        fault = pretrained.refusal(state[name], value)
        if fault is None:
            continue
        there = tuple(state[name].shape)
        if there == tuple(value.shape):
            raise UsageError(f"{where}: cannot be gone on with: {name} is {fault}; choose another checkpoint")
        if name == head and len(there) == 2 and there[1] == value.shape[1]:
            raise UsageError(f"{where}: has embedding size {there[0]}, not {value.shape[0]}; set --low-dim to it")
        raise UsageError(f"{where}: is of another network: {name} is {list(there)} there and {list(value.shape)} here")
    pretrained.refuse_nonfinite(state, where)
    bank = loaded.get("npc")
    memory = bank.get("memory") if isinstance(bank, dict) else None
    if isinstance(memory, torch.Tensor) and memory.layout is torch.strided:
        pretrained.refuse_nonfinite({"the memory bank": memory}, where)
    network.load_state_dict(state)


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
    for parameter, gathered in optimizer.state.items():
        if any(value.dim() and value.shape != parameter.shape for value in gathered.values() if torch.is_tensor(value)):
            raise ValueError("the optimiser's state is of parameters of other sizes")
    for group, mine in zip(optimizer.param_groups, own, strict=True):
        group.update(mine)


def load_bank(bank: MemoryBank, state: dict[str, torch.Tensor], where: Path) -> None:
    """Takes over the rows; UsageError where they are of another number of samples or embedding size."""
    memory, (samples, low_dim) = state["memory"], bank.rows.shape
    if memory.dim() == 2 and len(memory) != samples:
        raise UsageError(
            f"{where}: was trained on {len(memory)} samples, not {samples}; choose the data it was trained on"
        )
    if memory.dim() == 2 and memory.shape[1] != low_dim:
        raise UsageError(
            f"{where}: its memory bank has embedding size {memory.shape[1]}, not {low_dim}; set --low-dim to it"
        )
    bank.load_state_dict(state)
