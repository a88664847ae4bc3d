"""Timing, memory and tables."""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lib.session import provenance

Way = Callable[[], object]


def wait(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(way: Way, device: torch.device) -> float:
    """Seconds that one call takes."""
    wait(device)
    start = time.perf_counter()
    way()
    wait(device)
    return time.perf_counter() - start


def interleaved(ways: Mapping[str, Way], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each function, run in turn ``repeats`` times after one warm-up."""
    for way in ways.values():
        once(way, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(once(way, device))
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the repeats of slow / fast, each pair measured one after the other."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Median, minimum and maximum."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def against(seconds: Mapping[str, Sequence[float]], product: str, plain: str) -> str:
    """A table of the seconds of each implementation, relative to a bare product and to the plain implementation."""
    rows = [
        (name, spread(values), f"{ratio(values, seconds[product]):.2f}", f"{ratio(seconds[plain], values):.2f}")
        for name, values in seconds.items()
    ]
    return table(["way", "seconds", "times the product", "times faster than plain"], rows)


def peak_memory(way: Way, device: torch.device) -> int:
    """Peak of the additional memory of a call, in bytes; on the host this needs Linux."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak to the current memory
    before = status("VmRSS")
    way()
    return status("VmHWM") - before


def status(field: str) -> int:
    """A memory figure of this process from Linux, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def machine(device: torch.device, repeats: int) -> str:
    """Hardware, versions and date of a measurement."""
    versions = provenance.versions()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "torchvision", "numpy"))
    day = datetime.now(timezone.utc).date().isoformat()
    commit = provenance.commit()[:10] or "unknown"
    return (
        f"{provenance.hardware(device)}; {platform.system()}; {shown}; commit {commit}; {repeats} repeats, "
        f"interleaved, median (least to greatest); {day}."
    )


def gpus(device: torch.device) -> str:
    """The value of main.py's ``--gpus`` for a device."""
    return "" if device.type == "cpu" else str(device.index or 0)


def unit_rows(samples: int, low_dim: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Rows (N, D) of unit length in fifty clusters, similar to embeddings."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(50, low_dim, generator=draw)
    rows = centres[torch.randint(50, (samples,), generator=draw)] + torch.randn(samples, low_dim, generator=draw)
    return torch.nn.functional.normalize(rows, dim=1).to(device)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; '-' without values."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; none without the file. An incomplete last line is ignored."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]
