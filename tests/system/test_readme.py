"""What README says, held against the program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from datasets import DATASETS
from lib.config.options import Options
from lib.config.parser import options_table, read_options
from lib.method.diagnostics import FIGURES, QUANTILES, READING
from models import NETWORKS, build

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_options_table_is_the_program_s_own() -> None:
    written = re.search(r"<!-- options.*?-->\n(.*?)\n<!-- end of options -->", README, re.DOTALL)
    assert written and written[1] == options_table(), "run the command beside the table and paste what it prints"


def test_it_tells_how_to_read_each_health_figure() -> None:
    assert all(f"| `{name}` | {sentence} |" in README for name, sentence in READING.items())
    assert {name.split("_")[0] if name in QUANTILES else name for name in FIGURES} == set(READING)


def test_every_data_set_and_network_is_named() -> None:
    assert all(f"`{name}`" in README for name in [*DATASETS, *NETWORKS])


def counted(name: str, pixels: int) -> tuple[str, str]:
    """Millions of parameters and thousands of millions of multiply-adds."""
    with torch.device("meta"):
        network = build(name, low_dim=128).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, pixels, pixels))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters / 1e6:.2f}", f"{counter.get_total_flops() / 2e9:.3f}"


def test_the_table_of_networks_counts_right() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\d+) x \2 \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert [name for name, *_ in rows] == list(NETWORKS)
    for name, pixels, parameters, adds in rows:
        assert counted(name, int(pixels)) == (parameters, adds), name


def test_the_two_set_up_commands_stand_in_it_once() -> None:
    for command in (
        "pip install -r requirements.txt && python main.py --cfgs configs/base.yaml configs/digits.yaml",
        "pip install -r requirements.txt -r requirements-dev.txt && python -m pytest",
    ):
        assert README.splitlines().count(command) == 1


def test_every_command_is_one_the_program_accepts() -> None:
    commands = re.findall(r"python main\.py ([^`\n]*)", README)
    assert len(commands) >= 5
    for words in commands:
        names = re.findall(r"--([A-Za-z-]+)", words)
        assert all(name.replace("-", "_") in Options.model_fields for name in names), words
        for path in re.findall(r"configs/\S+\.yaml", words):
            assert (ROOT / path).is_file(), path


def test_every_link_to_a_file_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid_and_opens_with_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#") and "python main.py --cfgs configs/base.yaml" in text
    words = ["configs/base.yaml", *([f"configs/{path.name}"] if path.name != "base.yaml" else [])]
    read_options(["--cfgs", *(str(ROOT / word) for word in words)])
    assert set(yaml.safe_load(text)) <= set(Options.model_fields)


def test_conda_takes_its_list_from_pip_s() -> None:
    content = yaml.safe_load((ROOT / "requirements.yaml").read_text(encoding="utf-8"))
    assert content["dependencies"][-1] == {"pip": ["-r requirements.txt"]}


def test_every_requirement_says_what_it_is_for() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or re.match(r"\S+\s+# \w+", line), line
