"""Reads network weights from files, and matches them by name and shape.

Only tensors and plain containers are read. A file that contains anything else is refused, as it could run code.
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
"""First bytes of the file format of PyTorch before 1.6, which is not a zip file."""

CHECKSUM_MARK = b"\nSHA-256 "
"""Precedes the checksum at the end of this program's checkpoints."""
CHECKSUM_SIZE = len(CHECKSUM_MARK) + 64
"""Size of the mark and the checksum, in bytes."""
SHOWN = 20
"""Maximum number of names that a message lists."""

BACKBONE = "backbone."
"""Precedes the names of a network of another package (``models/library.py``)."""
COUNTER = "num_batches_tracked"
"""Buffer of batch normalisation that PyTorch before 0.4.1 did not save. Nothing here depends on it."""


@dataclass(frozen=True)
class Match:
    """The tensors of a file that match a network.

    Attributes:
        loaded: matching tensors, by the network's names.
        unexpected_keys: names in the file that cannot be loaded -> the reason.
        missing_keys: names in the network without a matching tensor in the file.
        prefix: prefix of the names in the file.
    """

    loaded: dict[str, torch.Tensor]
    unexpected_keys: dict[str, str]
    missing_keys: list[str]
    prefix: str


def read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint or weights file onto the CPU.

    Accepts checkpoints of this program and of the reference, state dicts, plain or under ``state_dict`` or ``model``,
    and safetensors files, with any file name; PyTorch files in the zip or the old format.

    Returns:
        The checkpoint, with its weights under ``net``, or a dict with the state dict under ``weights``.

    Raises:
        UsageError: the file is missing or damaged, contains other objects, or contains no weights.
    """
    content = _open(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: contains no weights, but a {type(content).__name__}; choose another file")
    if isinstance(content.get("net"), dict):
        return content
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), dict):
            return {"weights": content[name]}
    if content and all(torch.is_tensor(value) for value in content.values()):
        return {"weights": content}
    raise UsageError(
        f"{path}: is not a state dict, and has no weights under 'net', 'state_dict' or 'model'; choose another file"
    )


def append_checksum(file: BinaryIO) -> None:
    """Appends the SHA-256 checksum to an open file in PyTorch's old format, whose readers ignore trailing bytes."""
    file.flush()
    with Path(file.name).open("rb") as written:
        digest = _digest(written, file.tell())
    file.write(CHECKSUM_MARK + digest)


def _has_checksum(file: BinaryIO) -> bool:
    """Whether the file ends in this program's checksum. Raises ValueError if it does not match."""
    size = file.seek(0, io.SEEK_END) - CHECKSUM_SIZE
    if size < 0:
        return False
    file.seek(size)
    if file.read(len(CHECKSUM_MARK)) != CHECKSUM_MARK:
        return False
    expected = file.read()
    file.seek(0)
    if _digest(file, size) != expected:
        raise ValueError("checksum mismatch")
    return True


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the next ``size`` bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    while size > 0 and (part := file.read(min(size, 2**20))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode("ascii")


def _open(path: Path) -> Any:
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about files before it refuses them
            start = file.read(len(OLD_FORMAT))
            if start[8:9] == b"{":  # safetensors: eight bytes with the size of a JSON header, then the header
                return safetensors.torch.load_file(path)
            file.seek(0)
            if start != OLD_FORMAT:
                return torch.load(file, map_location="cpu", weights_only=True)
            has_checksum = _has_checksum(file)
            source = _python_3(file)
            content = torch.load(source, map_location="cpu", weights_only=True)
            if not has_checksum and 0 < len(source.read(CHECKSUM_SIZE + 1)) <= CHECKSUM_SIZE:
                raise ValueError("incomplete checksum")
            return content
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; choose an existing file") from None
    except Exception as error:  # damaged files make the readers raise nearly anything
        if isinstance(error, OSError) and error.strerror:
            what = f"cannot be read: {error.strerror}"
        elif (isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error)) or "TorchScript" in str(error):
            what = "contains objects other than tensors and plain containers, which could run code; it was not loaded"
        else:
            what = "is damaged, incomplete, or not a PyTorch or safetensors file"
        raise UsageError(f"{path}: {what}; choose another file") from None


def _python_3(file: BinaryIO) -> BinaryIO:
    """Converts a file in the old format that was pickled by Python 2, so that ``weights_only`` loading accepts it.

    Python 2 pickled integers beyond 32 bits as text (opcode INT), among them the parameter ids of PyTorch 1.0's
    optimisers, and strings of more than 255 bytes with opcode BINSTRING. The opcodes are listed, never executed.
    Returns the file itself if there are none of these, and a converted copy otherwise.
    """
    other: dict[int, tuple[int, bytes]] = {}  # start of an opcode -> its end and its replacement
    start = file.seek(0)
    for _ in range(5):  # magic number, version, system, content, storage keys; raw data follows
        for code, value, _ in pickletools.genops(file):
            end = file.tell()
            if code.name == "INT":
                other[start] = end, pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP
            elif code.name == "BINSTRING":
                other[start] = start + 1, b"X"  # BINUNICODE, which has the same layout
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
    """A parameter's name without the ``module.`` of DataParallel, in front or after ``features.`` (AlexNet)."""
    return name.removeprefix("module.").replace("features.module.", "features.", 1)


def match(network: torch.nn.Module, state: Mapping[Any, Any]) -> Match:
    """Matches tensors by name and shape.

    The names in the file may have a prefix, such as ``module.`` or ``module.encoder_q.``. The prefix that gives the
    most matches is removed. The files of a package lack the ``backbone.`` in the names of its networks here.
    """
    own = network.state_dict()
    found = _match(own, {name: name for name in own}, state)
    if any(name.startswith(BACKBONE) for name in own):
        of_package = _match(own, {name.removeprefix(BACKBONE): name for name in own}, state)
        return max(found, of_package, key=lambda each: len(each.loaded))
    return found


def _match(own: Mapping[str, torch.Tensor], names: Mapping[str, str], state: Mapping[Any, Any]) -> Match:
    """``match``, where ``names`` maps the names that are expected in the file to those of the network's tensors."""
    named = {str(name).replace("features.module.", "features.", 1): value for name, value in state.items()}
    votes: Counter[str] = Counter()
    for name, value in named.items():
        parts = name.split(".")
        for i in range(len(parts)):
            inner = ".".join(parts[i:])
            if inner in names and refusal(value, own[names[inner]]) is None:
                votes[name.removesuffix(inner)] += 1
    prefix = max(votes, key=lambda path: (votes[path], -len(path)), default="")
    loaded, unexpected_keys = {}, {}
    for name, value in named.items():
        inner = name.removeprefix(prefix)
        known = name.startswith(prefix) and inner in names
        reason = refusal(value, own[names[inner]]) if known else "not in this network"
        if reason is None:
            loaded[names[inner]] = value
        else:
            unexpected_keys[name] = reason
    missing_keys = [name for name in own if name not in loaded and not name.endswith(COUNTER)]
    return Match(loaded, unexpected_keys, missing_keys, prefix)


def refusal(value: Any, own: torch.Tensor) -> str | None:
    """Why a value cannot be loaded into a tensor of the network, or None if it can."""
    if not torch.is_tensor(value) or value.is_nested or value.layout is not torch.strided:
        return "not a plain tensor"
    if value.is_meta != own.is_meta:
        return "without data"
    if value.shape != own.shape:
        return f"of shape {list(value.shape)} where the network has {list(own.shape)}"
    if value.is_floating_point() != own.is_floating_point():
        return f"of type {str(value.dtype).removeprefix('torch.')}"
    return None


def refuse_nonfinite(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raises UsageError if a tensor contains NaN or infinite values."""
    bad = [name for name, value in tensors.items() if not value.is_meta and not value.isfinite().all()]
    if bad:
        raise UsageError(
            f"{where}: contains values that are not finite (in {_list(bad, 3)}), probably because the run diverged; "
            "choose an earlier checkpoint"
        )


def load(network: torch.nn.Module, state: Mapping[Any, Any], where: Path) -> Match:
    """Loads the weights that match into the network, and logs loaded, unexpected and missing names.

    Raises:
        UsageError: fewer than half of the network's tensors match, or a tensor contains NaN or infinite values.
    """
    found = match(network, state)
    loaded = [name for name in found.loaded if not name.endswith(COUNTER)]
    total = len(loaded) + len(found.missing_keys)
    unexpected_keys = [f"{name} ({reason})" for name, reason in found.unexpected_keys.items()]
    if 2 * len(loaded) < total:
        raise UsageError(
            f"{where}: only {len(loaded)} of the network's {total} tensors match by name and shape (missing: "
            f"{_list(found.missing_keys, 3)}; unexpected: {_list(unexpected_keys, 3) or 'none'}); set --network to the "
            "network of the file"
        )
    refuse_nonfinite(found.loaded, where)
    network.load_state_dict(found.loaded, strict=False)
    parts = Counter(name.split(".")[0] for name in loaded)
    behind = f" (prefix {found.prefix!r} removed)" if found.prefix else ""
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
        log("unexpected keys, not loaded: %s", _list(unexpected_keys))
    if found.missing_keys:
        log("missing keys, left as initialised: %s", _list(found.missing_keys))
    if head(network) in found.missing_keys:
        logger().warning("%s: has no weights for the embedding layer, which is random until it is trained", where)
    return found


def load_pretrained(network: torch.nn.Module, path: Path) -> Match:
    """Reads a weights file and loads it into the network; raises UsageError as ``read`` and ``load``."""
    content = read(path)
    return load(network, content["net"] if "net" in content else content["weights"], path)


def head(network: torch.nn.Module) -> str:
    """Name of the embedding layer's weight (D, inputs)."""
    return [name for name in network.state_dict() if name.endswith(".weight")][-1]


def _list(names: Iterable[str], shown: int = SHOWN) -> str:
    every = list(names)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more
