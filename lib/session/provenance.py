"""What a run ran on: versions, commit, machine."""

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
"""What a run executes, from the root of the repository."""


def versions() -> dict[str, str]:
    """Python's and the packages' versions as installed."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def commit() -> str:
    """The git commit of the code; '' outside git.

    Where ``CODE`` differs from it, new files included, there follow '+' and a digest of the files that do: two runs of
    changed code are of the same code where these are equal, too.
    """
    here = Path(__file__).resolve().parents[2]

    def git(*words: str) -> bytes:
        # without a lock, which a run that is killed right now would leave in the repository
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
    """The CPU's model, and the vector instructions that PyTorch uses on it."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()  # Linux; elsewhere the line above
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def hardware(device: torch.device) -> str:
    """The device in words: a GPU's name, or the CPU's kind and the threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {platform.machine()} ({processor()}), {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"
