"""Saves and restores the training state.

A checkpoint has the reference's keys ``net``, ``optimizer``, ``ANs_discovery``, ``npc``, ``acc``, ``epoch``, ``round``
and ``session``. Further keys make resuming exact: fields of ``TrainingState``, and ``network``, the name of the
backbone. It contains only tensors and plain containers, and is read with ``weights_only=True``. Keys may be missing,
as in a file with weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Set
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
"""Keys of a checkpoint that describe the neighbourhoods of its round."""


@dataclass
class TrainingState:
    """The complete state of training.

    Attributes:
        network: images (B, 3, H, W) -> embeddings (B, D).
        optimizer: over the network's parameters.
        bank: N rows.
        neighbourhoods: of the current round.
        seed: seed of the run.
        scaler: gradient scaler for fp16; disabled otherwise.
        round, epoch: next to run. The round is complete when ``epoch`` equals ``max_epoch``.
        step: next to run in the epoch. When it equals the number of steps, the epoch is trained but not evaluated.
        total, seen: sum of the losses of the epoch so far, a scalar on the device, and their number of images.
        skipped: batches of the epoch that were skipped because the loss was NaN or infinite.
        passes: images that the network has been trained on since the start of the run, each view of them counted.
        acc: accuracy in [0, 1] after the last epoch; None without labels.
        best_acc: best accuracy of the round so far.
        history: metrics of the last epoch of each round.
        health: state that the next epoch's health metrics are compared with; None before the first epoch.
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
    passes: int = 0
    acc: float | None = None
    best_acc: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    health: diagnostics.State | None = None

    def checkpoint(self, network_name: str, session: str) -> Checkpoint:
        """The state as tensors and plain containers. Call it on every rank; only rank 0's has the memory bank."""
        device = self.bank.memory.device
        return {
            "net": {saved_name(name, network_name, device): value for name, value in self.network.state_dict().items()},
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
            "passes": self.passes,
            "best_acc": self.best_acc,
            "seed": self.seed,
            "history": self.history,
            "scaler": self.scaler.state_dict(),
            "health": None if self.health is None else self.health.state_dict(),
            "network": network_name,
        }

    def restore(self, loaded: Checkpoint, where: Path, *, embed: Callable[[], torch.Tensor]) -> None:
        """Restores the state from a checkpoint. Missing parts are initialised, and the log says so.

        Args:
            loaded: the checkpoint.
            where: its file, for messages.
            embed: returns the embeddings (n, D) of this rank's training images; called if there is no memory bank.

        Raises:
            UsageError: the checkpoint has another network, embedding size or number of samples, or is inconsistent.
        """
        load_network(self.network, loaded, where)
        if "npc" not in loaded:
            logger().info("%s: no memory bank: it is initialised with the embeddings of the training images", where)
            self.bank.memory.copy_(embed())
        try:
            if "npc" in loaded:
                load_bank(self.bank, loaded["npc"], where)
            if "optimizer" in loaded:
                load_optimizer(self.optimizer, loaded["optimizer"], where)
            else:
                logger().info("%s: no optimiser state: the momentum starts at zero", where)
            if loaded.get("scaler") and self.scaler.is_enabled():
                self.scaler.load_state_dict(loaded["scaler"])
            self.round, self.epoch = int(loaded.get("round", 0)), int(loaded.get("epoch", 0))
            self.step, self.seen = int(loaded.get("step", 0)), int(loaded.get("seen", 0))
            self.skipped = int(loaded.get("skipped", 0))
            self.total = torch.as_tensor(loaded.get("total", 0.0), dtype=torch.float32).to(self.bank.memory.device)
            if min(self.round, self.epoch, self.step, self.seen) < 0 or self.total.dim():
                raise ValueError("the round, the epoch or the step is negative, or the loss is not a scalar")
            self._restore_neighbourhoods(loaded, where)
            self.acc, best = (None if loaded.get(key) is None else float(loaded[key]) for key in ("acc", "best_acc"))
            self.best_acc = self.acc if best is None else best
            earlier = loaded.get("health")
            if earlier is not None and earlier["rows"] is None:  # removed by without_copies
                rows = diagnostics.measured(self.bank.samples).to(self.bank.memory.device)
                earlier = {**earlier, "rows": self.bank.rows.index_select(rows)}
            self.health = (
                None if earlier is None else diagnostics.State.from_state_dict(earlier, self.bank.memory.device)
            )
            self.history = [{**row, "round": int(row["round"])} for row in loaded.get("history", [])]
            self.passes = int(loaded.get("passes", self._passes_of_history()))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError, OverflowError) as error:
            raise UsageError(f"{where}: inconsistent content: {reason(error)}; choose another checkpoint") from None

    def _passes_of_history(self) -> int:
        """Image passes where a checkpoint does not count them: each epoch had every image once."""
        epochs = self.epoch + sum(row.get("epoch", -1) + 1 for row in self.history if row["round"] < self.round)
        return int(epochs * self.bank.samples + (self.seen if self.step else 0))

    def _restore_neighbourhoods(self, loaded: Checkpoint, where: Path) -> None:
        """Restores the neighbourhoods. If they are missing or empty, the round starts again with a discovery."""
        if "ANs_discovery" in loaded and loaded["ANs_discovery"]["neighbours"].shape != (0,):
            found = Neighbourhoods.from_state_dict(loaded["ANs_discovery"], self.bank.memory.device)
            if len(found.position) != self.bank.samples:
                raise ValueError("the memory bank and the neighbourhoods have different numbers of samples")
            self.neighbourhoods = found
        elif self.round and self.epoch:
            logger().info("%s: no neighbourhoods: round %d starts again with a discovery", where, self.round)
            self.epoch = self.step = 0


def saved_name(name: str, network_name: str, device: torch.device) -> str:
    """A parameter's name in a checkpoint. On a GPU, it has the prefix that the reference's DataParallel adds.

    The reference wraps only the convolutions of AlexNet in DataParallel, and other networks as a whole.
    """
    if device.type != "cuda":
        return name
    if network_name.startswith("alexnet"):
        return f"features.module.{rest}" if (rest := name.removeprefix("features.")) != name else name
    return f"module.{name}"


def save(content: Checkpoint, path: Path) -> None:
    """Writes a checkpoint atomically and appends its checksum. An existing latest.ckpt becomes previous.ckpt.

    Weights are written in the contiguous layout, as the reference has them. That is done here and not for each copy
    in memory, most of which are never written.

    Raises:
        OSError: the file cannot be written.
    """
    if path.name == LATEST and path.exists():
        hard_link(path, path.with_name(PREVIOUS))
    content = {**content, "net": {name: value.contiguous() for name, value in content["net"].items()}}
    with atomic_write(path) as file:
        try:
            # the only format that PyTorch 1.0, which the reference uses, can read
            torch.save(content, file, _use_new_zipfile_serialization=False)
        except RuntimeError as error:
            if "write()" not in str(error):
                raise
            raise OSError(0, str(error)) from None  # PyTorch reports a full disk as a RuntimeError
        pretrained.append_checksum(file)


def without_copies(content: Checkpoint) -> Checkpoint:
    """A checkpoint of the end of an epoch without ``health["rows"]``, which are copies of rows of its memory bank."""
    if content.get("health") is None:
        return content
    return {**content, "health": {**content["health"], "rows": None}}


def copy_to_host(content: Any, memory: Any = None) -> Any:
    """A deep copy of a checkpoint in host memory.

    Args:
        content: the checkpoint, or a part of it.
        memory: an earlier copy, whose tensors are overwritten where they fit. That takes less than half of the time:
            the system has to clear new memory first.
    """
    if isinstance(content, torch.Tensor):
        if isinstance(memory, torch.Tensor) and (memory.shape, memory.dtype) == (content.shape, content.dtype):
            return memory.copy_(content)
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        earlier = memory if isinstance(memory, dict) else {}
        return {name: copy_to_host(value, earlier.get(name)) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        parts = memory if isinstance(memory, (list, tuple)) and len(memory) == len(content) else [None] * len(content)
        return type(content)(copy_to_host(*pair) for pair in zip(content, parts, strict=True))
    return content


def save_discovery(content: Checkpoint, path: Path) -> None:
    """Writes only the neighbourhoods of a checkpoint, without network, optimiser and memory bank; see ``discoveries``.

    Raises:
        OSError: the file cannot be written.
    """
    save({"net": {}, **{name: content[name] for name in DISCOVERY if name in content}}, path)


def remove_best_checkpoints(folder: Path, except_for: Path | None) -> None:
    """Removes the best checkpoints of all rounds except one. Their neighbourhoods are kept in ``neighbours/``.

    Raises:
        OSError: a file cannot be written or removed.
    """
    for path in sorted((folder / "checkpoint").glob("[0-9]*.ckpt")):
        if path == except_for:
            continue
        record = folder / "neighbours" / path.name
        try:
            if not record.exists():
                save_discovery(load(path), record)
            path.unlink()
        except UsageError as error:
            logger().warning("%s (the file was not removed)", error)


def make_latest(path: Path) -> None:
    """Makes the checkpoint that is resumed the latest one of its session.

    Otherwise the next ``save`` would make the old latest.ckpt, which belongs to another run or is damaged, the previous
    checkpoint.

    Raises:
        OSError: the link or copy cannot be created.
    """
    if path.name != LATEST:
        hard_link(path, path.with_name(LATEST))


def load_resumed(resume: Path, ranks: Ranks | None = None) -> tuple[Path, Checkpoint]:
    """Reads the checkpoint of ``--resume``: its path and content. If a session's latest is damaged, the previous one.

    Rank 0 reads the file and broadcasts the content. The other ranks receive a tensor on the "meta" device in place of
    the memory bank, which would fill their memory.

    Raises:
        UsageError: there is no usable checkpoint. Raised on all ranks (see ``run_on_all_ranks``).
    """
    ranks = ranks or Ranks()
    read = run_on_all_ranks(ranks, lambda: _latest_undamaged(resume) if ranks.is_rank0 else None)
    received = ranks.broadcast_object(read and (read[0], _without_rows(read[1])))
    return read or received


def _without_rows(loaded: Checkpoint) -> Checkpoint:
    if not isinstance(memory := loaded.get("npc", {}).get("memory"), torch.Tensor):
        return loaded
    return {**loaded, "npc": {**loaded["npc"], "memory": memory.to("meta")}}


def _latest_undamaged(resume: Path) -> tuple[Path, Checkpoint]:
    path = locate(resume)
    previous = path.with_name(PREVIOUS)
    if not resume.is_dir() or path == previous or not previous.is_file():
        return path, load(path)
    try:
        return path, load(path)
    except UsageError as error:
        logger().warning("%s", error)
        logger().warning("resuming from the previous checkpoint: %s", previous)
        return previous, load(previous)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint, or a file with weights (returned under ``weights``), onto the CPU.

    Raises:
        UsageError: the file is damaged, contains other objects or no weights, or its memory bank is not a tensor.
    """
    loaded = pretrained.read(path)
    if "npc" in loaded:
        memory = loaded["npc"].get("memory") if isinstance(loaded["npc"], dict) else None
        if not isinstance(memory, torch.Tensor) or memory.layout != torch.strided or memory.is_nested or memory.is_meta:
            raise UsageError(f"{path}: its memory bank is not a plain tensor; choose another checkpoint")
    return loaded


def discoveries(folder: Path | None, current: Checkpoint, samples: int) -> list[tuple[int, Neighbourhoods]]:
    """(round, neighbourhoods) of each round with a discovery, sorted by round.

    Args:
        folder: a session folder, whose best checkpoints, or the files that ``save_discovery`` wrote, are read for the
            earlier rounds; None: only ``current`` is used.
        current: a checkpoint.
        samples: N.

    Raises:
        UsageError: a checkpoint is damaged, or has another number of samples.
    """
    # later files take precedence: a checkpoint over a file of save_discovery
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
                raise UsageError(
                    f"{where}: has {len(here.position)} samples, not {samples}; choose the data it was trained on"
                )
            # before its first step, a round still has the neighbourhoods of the previous one
            begun = int(content["epoch"]) > 0 or int(content.get("step", 0)) > 0
            if here.num_anchors:
                found[int(content["round"]) - (not begun)] = here
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UsageError(
                f"{where}: its neighbourhoods cannot be read: {reason(error)}; choose another checkpoint"
            ) from None
    return sorted(found.items())


def load_network(network: torch.nn.Module, loaded: Checkpoint, where: Path) -> None:
    """Loads the checkpoint's weights into the network. Prefixes of DataParallel are removed.

    The weights of a training run (``net``) must match completely; of other files (``weights``), those that match by
    name and shape are loaded.

    Raises:
        UsageError: the checkpoint has another network or embedding size, or contains NaN or infinite values.
    """
    if "net" not in loaded:
        pretrained.load(network, loaded["weights"], where)
        return
    if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded["net"].items()):
        raise UsageError(f"{where}: its 'net' must map names to tensors only; choose another checkpoint")
    state = {pretrained.strip_prefix(name): value for name, value in loaded["net"].items()}
    own = network.state_dict()
    for name in own.keys() - state.keys():
        if name.endswith(pretrained.COUNTER):
            state[name] = own[name]  # missing in files of PyTorch before 0.4.1; nothing depends on it
    if state.keys() != own.keys():
        refuse_other_head(state.keys(), own.keys(), pretrained.head(network), where)
        name = f"network {loaded['network']}" if "network" in loaded else "another network"
        first = min(state.keys() ^ own.keys())
        side = "missing in the checkpoint" if first in own else "only in the checkpoint"
        raise UsageError(
            f"{where}: contains weights of {name}, not of the network chosen with --network ({first} is {side}); set "
            "--network to the one of the checkpoint"
        )
    head = pretrained.head(network)
    for name, value in own.items():
        fault = pretrained.refusal(state[name], value)
        if fault is None:
            continue
        there = tuple(state[name].shape)
        if there == tuple(value.shape):
            raise UsageError(f"{where}: cannot be resumed: {name} is {fault}; choose another checkpoint")
        if name == head and len(there) == 2 and there[1] == value.shape[1]:
            raise UsageError(f"{where}: has embedding size {there[0]}, not {value.shape[0]}; set --low-dim to it")
        raise UsageError(
            f"{where}: contains another network: {name} has shape {list(there)} in the checkpoint and "
            f"{list(value.shape)} in the network; set --network to the one of the checkpoint"
        )
    pretrained.refuse_nonfinite(state, where)
    bank = loaded.get("npc")
    memory = bank.get("memory") if isinstance(bank, dict) else None
    if isinstance(memory, torch.Tensor) and memory.layout is torch.strided:
        pretrained.refuse_nonfinite({"the memory bank": memory}, where)
    network.load_state_dict(state)


def refuse_other_head(there: Set[str], own: Set[str], head: str, where: Path) -> None:
    """Raises UsageError if only the layers at the end of the network have other names in the checkpoint (``--head``).

    Args:
        there: names in the checkpoint.
        own: names of the network's parameters and buffers.
        head: name of the weight of the network's last layer.
        where: the checkpoint, for the message.
    """
    last = head.removesuffix(".weight")
    for stem, kind in ((last, "mlp"), (last.removesuffix(".2"), "linear")):
        heads = {"linear": {f"{stem}.{part}" for part in ("weight", "bias")}}
        heads["mlp"] = {f"{stem}.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
        if there - own == heads[kind] and own - there == heads["linear" if kind == "mlp" else "mlp"]:
            raise UsageError(
                f"{where}: was trained with --head {kind}; set --head {kind}, or choose another checkpoint"
            )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], where: Path) -> None:
    """Loads the optimiser's buffers, such as momentum. Learning rate, weight decay etc. are set by the options.

    Raises:
        UsageError: the state belongs to another type of optimiser.
        ValueError: its buffers have other shapes than the parameters.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    kinds = {"nesterov", "betas", "alpha"}  # of SGD, Adam, RMSprop; other keys differ between PyTorch versions
    if any(
        kinds & mine.keys() != kinds & theirs.keys() for mine, theirs in zip(own, state["param_groups"], strict=True)
    ):
        raise UsageError(f"{where}: was trained with another optimiser; set --optimizer to it")
    groups = [{**theirs, **mine} for mine, theirs in zip(own, state["param_groups"], strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})  # a fused optimiser wants its step counts on the GPU
    for parameter, gathered in optimizer.state.items():
        if any(value.dim() and value.shape != parameter.shape for value in gathered.values() if torch.is_tensor(value)):
            raise ValueError("the optimiser's state has other shapes than the parameters")


def load_bank(bank: MemoryBank, state: dict[str, torch.Tensor], where: Path) -> None:
    """Loads the rows of the memory bank.

    Raises:
        UsageError: they have another number of samples or embedding size.
    """
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
