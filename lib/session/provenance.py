"""Records what a run uses: package versions, git commit and hardware."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "matplotlib",
    "scikit-learn",
    "graspologic-native",
    "Jinja2",
    "pydantic",
    "PyYAML",
    "tensorboardX",
    "tqdm",
    "filelock",
    "psutil",
    "safetensors",
    "pillow",
)

CODE = ("main.py", "lib/*.py", "models/*.py", "datasets/*.py")
"""The source files of a run, relative to the root of the repository."""


def versions() -> dict[str, str]:
    """Versions of Python and of those ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """The git commit of the code, or '' outside a git repository.

    If files of ``CODE`` differ from the commit or are untracked, '+' and a digest of these files follow. Two runs use
    the same code if both parts are equal.
    """
    here = Path(__file__).resolve().parents[2]

    def git(*words: str) -> bytes:
        # no lock: a run that is killed here would leave it in the repository
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, cwd=here, capture_output=True, check=True, timeout=10).stdout

    try:
        head = git("rev-parse", "HEAD").decode("ascii").strip()
        changed = git("status", "--porcelain", "-z", "--untracked-files=normal", "--no-renames", "--", *CODE)
        digest = hashlib.sha256()
        for entry in changed.split(b"\0")[:-1]:  # "XY path"
            path = here / os.fsdecode(entry[3:])
            digest.update(entry + (path.read_bytes() if path.is_file() else b""))
        return f"{head}+{digest.hexdigest()[:12]}" if changed else head
    except (OSError, subprocess.SubprocessError):
        return ""


def processor() -> str:
    """The CPU model and the vector instruction set that PyTorch uses."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()  # Linux only
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def hardware(device: torch.device) -> str:
    """Description of the device: the GPU's name, or the CPU model, cores and PyTorch threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {platform.machine()} ({processor()}), {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"
