"""The examples of docs/extending.md are applied to a copy of the code and run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import runs
from datasets.digits import FILE
from runs import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = {text.split("\n")[0]: text for text in PAGE.split("\n## ")[1:]}


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


def apply_diff(root: Path, diff: str) -> None:
    """Applies the hunks, separated by `@@`, to the file in the first line; each must match in exactly one place."""
    header, _, body = diff.partition("\n")
    path = root / header.removeprefix("# ")
    text = path.read_text(encoding="utf-8")
    for hunk in body.split("@@\n"):
        lines = hunk.splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"{path}: {before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def copy_of_the_code(folder: Path) -> Path:
    for name in ("lib", "models", "datasets", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", folder)
    return folder


def save_arrays(folder: Path) -> None:
    """Saves the digits in the file format of the example's data set."""
    folder.mkdir(parents=True)
    with np.load(FILE) as file:
        images = np.repeat((file["images"] * 15).astype(np.uint8)[..., None], 3, axis=3)
        for name, chosen in (("train", ~file["is_test"]), ("test", file["is_test"])):
            np.savez(folder / f"{name}.npz", images=images[chosen], labels=file["labels"][chosen])


EXAMPLES = {
    "A backbone": ("network", "convnet", "network: convnet, "),
    "A data set": ("dataset", "arrays", "data: arrays, 1437 training images, 360 test images, 10 classes"),
    "A loss": ("loss", "mean-log", "round 1"),
}
"""Section -> the option that selects the example, its value, and the log line to expect."""


@pytest.mark.slow
@pytest.mark.parametrize("section", EXAMPLES)
def test_each_example_of_the_docs_trains(section: str, tmp_path: Path) -> None:
    option, value, logged = EXAMPLES[section]
    root = copy_of_the_code(tmp_path / "code")
    for code in blocks(section, "python"):
        path = root / code.partition("\n")[0].removeprefix("# ")
        assert not path.exists()
        path.write_text(code, encoding="utf-8")
    for diff in blocks(section, "diff"):
        apply_diff(root, diff)
    save_arrays(root / "data" / "arrays")
    (command,) = blocks(section, "sh")
    python, program, *words = shlex.split(command)
    assert (python, program) == ("python", "main.py")
    process = runs.start(*words, "--session", "run", "--seed", "0", cwd=root)
    shown = runs.output_of(process)
    assert process.returncode == 0, shown
    assert logged in shown
    config = yaml.safe_load((root / "sessions" / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert config[option] == value
    assert len(runs.metrics(root / "sessions" / "run")) == 2


def test_example_loss_is_the_mean_instance_loss() -> None:
    (code,) = blocks("A loss", "python")
    scope: dict[str, object] = {}
    exec(code, scope)  # code of this repository
    draw = torch.Generator().manual_seed(0)
    rows, embeddings = (
        torch.nn.functional.normalize(torch.randn(count, 4, generator=draw, dtype=torch.float64), dim=1)
        for count in (7, 3)
    )
    neighbourhoods = torch.tensor([[0, 5], [1, -1], [2, 3]])
    log_p = torch.log_softmax(embeddings @ rows.T / 0.1, dim=1)
    expected = -torch.stack([(log_p[0, 0] + log_p[0, 5]) / 2, log_p[1, 1], (log_p[2, 2] + log_p[2, 3]) / 2]).mean()
    found = scope["mean_log_loss"](embeddings, rows, neighbourhoods, temperature=0.1)  # type: ignore[operator]
    assert torch.allclose(found, expected)
