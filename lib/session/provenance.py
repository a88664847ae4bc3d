"""What a run ran on: versions, commit, machine."""

from __future__ import annotations

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


def versions() -> dict[str, str]:
    """Python's and the packages' versions as installed."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def commit() -> str:
    """The git commit of the code, '+' after it where tracked files were changed; '' outside git."""
    here = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        # without a lock, which a run that is killed right now would leave in the repository
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")
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
