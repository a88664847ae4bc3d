"""Network weights of any origin: read from a file, matched by name and shape.

Files hold tensors and plain containers, or are refused: nothing in them can run.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from lib.errors import UsageError
from lib.session.console import logger

OLD_FORMAT = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
"""What a file that is no zip, as PyTorch before 1.6 wrote it, starts with."""

SEAL = b"\nSHA-256 "
"""Stands before the checksum at the end of this program's checkpoints."""
SEALED = len(SEAL) + 64
"""Bytes of both."""
SHOWN = 20
"""Names that a message lists before it counts the others."""

COUNTER = "num_batches_tracked"
"""Of batch normalisation: PyTorch before 0.4.1 did not write it, and nothing here depends on it."""


@dataclass(frozen=True)
class Match:
    """What of a file's weights a network can take.

    Attributes:
        loaded: tensors by the network's names.
        dropped: names in the file, and why each is of no use.
        fresh: names in the network that the file has nothing for.
        prefix: what the file puts in front of every name.
    """

    loaded: dict[str, torch.Tensor]
    unexpected_keys: dict[str, str]
    missing_keys: list[str]
    prefix: str


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint or weights file, onto the CPU; its weights are under ``net`` or, where the
    file is nobody's training run, ``weights``.

    Takes this program's checkpoints and the reference's, a state dict, bare or under ``state_dict`` or
    ``model``, and safetensors, whatever the file is called; PyTorch's files as a zip or in the old format.

    Raises:
        UsageError: the file is missing, damaged, holds anything else, or no weights.
    """
    content = _open(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds no weights but a {type(content).__name__}; choose another file")
    if isinstance(content.get("net"), dict):
        return content
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), dict):
            return {"weights": content[name]}
    if content and all(torch.is_tensor(value) for value in content.values()):
        return {"weights": content}
    raise UsageError(
        f"{path}: holds no weights under 'net', 'state_dict' or 'model', and is no state dict; choose another file"
    )


def append_checksum(file: BinaryIO) -> None:
    """Adds the checksum of all that was written to a file of PyTorch's old format, whose readers stop before it."""
    file.flush()
    with Path(file.name).open("rb") as written:
        digest = _digest(written, file.tell())
    file.write(SEAL + digest)


def _is_sealed(file: BinaryIO) -> bool:
    """Whether the checksum stands at the end; ValueError where it does not fit. Files of others have none."""
    size = file.seek(0, io.SEEK_END) - SEALED
    if size < 0:
        return False
    file.seek(size)
    if file.read(len(SEAL)) != SEAL:
        return False
    expected = file.read()
    file.seek(0)
    if _digest(file, size) != expected:
        raise ValueError("the checksum does not fit")
    return True


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the next ``size`` bytes, as it is written down."""
    digest = hashlib.sha256()
    while size > 0 and (part := file.read(min(size, 2**20))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode("ascii")


def _open(path: Path) -> Any:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch, about files that it then refuses
            start = file.read(len(OLD_FORMAT))
            if start[8:9] == b"{":  # safetensors: eight bytes with the size of a JSON header, then the header
                return safetensors.torch.load_file(path)
            file.seek(0)
            if start != OLD_FORMAT:
                return torch.load(file, map_location="cpu", weights_only=True)
            is_sealed = _is_sealed(file)
            source = _python_3(file)
            content = torch.load(source, map_location="cpu", weights_only=True)
            if not is_sealed and 0 < len(source.read(SEALED + 1)) <= SEALED:
                raise ValueError("what stands behind the content is no whole checksum")
            return content
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; name one that exists") from None
    except Exception as error:  # damaged files make the readers raise nearly anything
        if isinstance(error, OSError) and error.strerror:
            what = f"cannot be read: {error.strerror}"
        elif (isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)) or "TorchScript" in str(error):
            what = "holds more than tensors and plain containers, which could run code, and was not opened"
        else:
            what = "is damaged, cut short, or no file of PyTorch or safetensors"
        raise UsageError(f"{path}: {what}; choose another file") from None


def _python_3(file: BinaryIO) -> BinaryIO:
    """A file in the old format, with what Python 2 alone pickled that way as PyTorch's safe reader takes it: itself,
    or a copy where there is such a thing.

    Python 2 wrote integers beyond 32 bits as text, among them the parameters' names in PyTorch 1.0's optimisers, and
    strings of more than 255 bytes with a code of their own. Codes are listed here and never followed.
    """
    other: dict[int, tuple[int, bytes]] = {}  # where a code starts: where it ends, and what is to stand there
    start = file.seek(0)
    for _ in range(5):  # magic number, version, machine, content, names of the storages; raw numbers follow
        for code, value, _ in pickletools.genops(file):
            end = file.tell()
            if code.name == "INT":
                other[start] = end, pickle.dumps(value, protocol=2)[2:-1]  # without its head and its full stop
            elif code.name == "BINSTRING":
                other[start] = start + 1, b"X"  # BINUNICODE, which has the same form
            start = end
    file.seek(0)
    if not other:
        return file
    parts = []
    for start, (end, instead) in other.items():
        parts += [file.read(start - file.tell()), instead]
        file.seek(end)
    return io.BytesIO(b"".join([*parts, file.read()]))


def strip_prefix(name: str) -> str:
    """A parameter's name without what the reference's GPU training adds: to AlexNet's features, or to all."""
    return name.removeprefix("module.").replace("features.module.", "features.", 1)


def match(network: torch.nn.Module, state: Mapping[Any, Any]) -> Match:
    """Pairs tensors by name and shape.

    Names in the file may all stand behind a path, such as ``module.`` or ``module.encoder_q.``: the one that
    lets most of them match is taken away.
    """
    own = network.state_dict()
    named = {str(name).replace("features.module.", "features.", 1): value for name, value in state.items()}
    votes: Counter[str] = Counter()
    for name, value in named.items():
        parts = name.split(".")
        for i in range(len(parts)):
            inner = ".".join(parts[i:])
            if inner in own and refusal(value, own[inner]) is None:
                votes[name.removesuffix(inner)] += 1
    prefix = max(votes, key=lambda path: (votes[path], -len(path)), default="")
    loaded, unexpected_keys = {}, {}
    for name, value in named.items():
        inner = name.removeprefix(prefix)
        known = name.startswith(prefix) and inner in own
        reason = refusal(value, own[inner]) if known else "not in this network"
        if reason is None:
            loaded[inner] = value
        else:
            unexpected_keys[name] = reason
    missing_keys = [name for name in own if name not in loaded and not name.endswith(COUNTER)]
    return Match(loaded, unexpected_keys, missing_keys, prefix)


def refusal(value: Any, own: torch.Tensor) -> str | None:
    """Why a value of a file cannot stand for a tensor of the network; None: it can."""
    if not torch.is_tensor(value) or value.is_nested or value.layout is not torch.strided:
        return "no plain tensor"
    if value.is_meta != own.is_meta:
        return "without numbers"
    if value.shape != own.shape:
        return f"of shape {list(value.shape)} where the network has {list(own.shape)}"
    if value.is_floating_point() != own.is_floating_point():
        return f"of type {str(value.dtype).removeprefix('torch.')}"
    return None


def refuse_nonfinite(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """UsageError where a tensor of a file holds NaN or an infinite number: all that is computed from it would, too."""
    bad = [name for name, value in tensors.items() if not value.is_meta and not value.isfinite().all()]
    if bad:
        raise UsageError(
            f"{where}: holds numbers that are not finite (in {_list(bad, 3)}), as of a run that has diverged; choose "
            "an earlier checkpoint"
        )


def load(network: torch.nn.Module, state: Mapping[Any, Any], where: Path) -> Match:
    """Puts somebody's weights into the network, as far as they fit, and logs what was loaded and what was not.

    Raises:
        UsageError: less than half of the network's tensors are there.
    """
    found = match(network, state)
    loaded = [name for name in found.loaded if not name.endswith(COUNTER)]
    total = len(loaded) + len(found.missing_keys)
    unexpected_keys = [f"{name} ({reason})" for name, reason in found.unexpected_keys.items()]
    if 2 * len(loaded) < total:
        raise UsageError(
            f"{where}: only {len(loaded)} of the network's {total} tensors are there by name and shape (it lacks "
            f"{_list(found.missing_keys, 3)}; it has {_list(unexpected_keys, 3) or 'nothing else'}); set --network to "
            "the one that it is of"
        )
    refuse_nonfinite(found.loaded, where)
    network.load_state_dict(found.loaded, strict=False)
    parts = Counter(name.split(".")[0] for name in loaded)
    behind = f" (names without {found.prefix!r})" if found.prefix else ""
    log = logger().info
    log(
        "%s: loaded %d of %d tensors%s: %s",
        where,
        len(loaded),
        total,
        behind,
        _list(f"{n} {k}" for n, k in parts.items()),
    )
    if unexpected_keys:
        log("dropped: %s", _list(unexpected_keys))
    if found.missing_keys:
        log("left as initialised: %s", _list(found.missing_keys))
    if head(network) in found.missing_keys:
        logger().warning("%s: has no weights for the embedding: until it is trained it is a random projection", where)
    return found


def load_pretrained(network: torch.nn.Module, path: Path) -> Match:
    """``load`` of a file that holds weights in any form; UsageError where it holds none, or too few that fit."""
    content = read(path)
    return load(network, content["net"] if "net" in content else content["weights"], path)


def head(network: torch.nn.Module) -> str:
    """Name of the weights that lead to the embedding: (D, inputs)."""
    return [name for name in network.state_dict() if name.endswith(".weight")][-1]


def _list(names: Iterable[str], shown: int = SHOWN) -> str:
    every = list(names)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more
