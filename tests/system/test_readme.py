"""The README and the pages in docs/ are compared with the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from datasets import DATASETS
from lib import ROOMS
from lib.config.options import Options
from lib.config.parser import options_table, read_options
from lib.method.diagnostics import FIGURES, QUANTILES, READING
from lib.method.loss import LOSSES
from models import NETWORKS, build, package_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_options_table_equals_the_generated_one() -> None:
    written = re.search(r"<!-- options.*?-->\n(.*?)\n<!-- end of options -->", text_of("docs/options.md"), re.DOTALL)
    assert written and written[1] == options_table(), "run the command beside the table and paste what it prints"


def test_every_health_figure_is_explained() -> None:
    page = text_of("docs/evaluation.md")
    assert all(f"| `{name}` | {sentence} |" in page for name, sentence in READING.items())
    assert {name.split("_")[0] if name in QUANTILES else name for name in FIGURES} == set(READING)


def test_every_data_set_network_and_loss_is_named() -> None:
    for page, names in (("docs/data.md", DATASETS), ("docs/options.md", NETWORKS), ("docs/options.md", LOSSES)):
        assert not [name for name in names if f"`{name}`" not in text_of(page)], page


def test_every_room_and_module_is_named() -> None:
    rooms = [room for room in ROOMS if (ROOT / "lib" / room).is_dir()]
    assert re.findall(r"^\| `lib/(\w+)/` \|", text_of("README.md"), re.MULTILINE) == rooms
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", text_of("docs/architecture.md"), re.MULTILINE)
    assert [room for room, _ in rows] == rooms
    for room, files in rows:
        modules = {path.stem for path in (ROOT / "lib" / room).glob("*.py")} - {"__init__"}
        assert set(re.findall(r"`(\w+)`", files)) == modules, room


def counted(name: str, pixels: int) -> tuple[str, str]:
    """Millions of parameters and billions of multiply-adds."""
    with torch.device("meta"):
        network = build(name, low_dim=128).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, pixels, pixels))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return f"{parameters / 1e6:.2f}", f"{counter.get_total_flops() / 2e9:.3f}"


def test_parameter_counts_in_the_table_are_correct() -> None:
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \| (\d+) x \2 \| ([\d.]+) \| ([\d.]+) \|$", text_of("docs/options.md"), re.MULTILINE
    )
    assert [name for name, *_ in rows] == list(NETWORKS)
    for name, pixels, parameters, adds in rows:
        assert counted(name, int(pixels)) == (parameters, adds), name


def test_each_set_up_command_occurs_once() -> None:
    for command in (
        "pip install -r requirements.txt && python main.py --cfgs configs/base.yaml configs/digits.yaml",
        "pip install -r requirements.txt -r requirements-dev.txt && python -m pytest",
    ):
        assert text_of("README.md").splitlines().count(command) == 1


def commands(text: str) -> list[list[str]]:
    """The arguments of every `main.py` command in a page, in code blocks and in the text."""
    found = re.findall(r"(?:python|torchrun [^`\n]*) main\.py(?: ([^`\n]*))?", text.replace("\\\n", " "))
    return [shlex.split(words.split("&&")[0], comments=True) for words in found]


NEW_NAMES = {"convnet", "arrays", "mean-log"}
"""Networks, data sets and losses of the examples in docs/extending.md; tests/system/test_extending.py runs them."""


@EACH_PAGE
def test_every_command_is_accepted_by_the_program(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page.read_text(encoding="utf-8")):
        try:  # the config of a session is an option file, too
            options = read_options(
                [re.sub(r"^sessions/NAME/config.yaml$", "configs/base.yaml", word) for word in words]
            )
        except SystemExit as end:
            assert words == ["--help"] and not end.code
            continue
        assert options.network in {*NETWORKS, *NEW_NAMES} or package_of(options.network)
        assert options.dataset in {*DATASETS, *NEW_NAMES}
        assert options.loss in {*LOSSES, *NEW_NAMES}


def test_pages_contain_commands() -> None:
    assert len(commands(text_of("README.md"))) >= 10
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) >= 25


@EACH_PAGE
def test_every_flag_in_the_text_is_an_option(page: Path) -> None:
    for name in re.findall(r"`--([A-Za-z][A-Za-z0-9-]*)", page.read_text(encoding="utf-8")):
        assert name == "help" or name.replace("-", "_") in Options.model_fields, name


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_every_link_has_a_target(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@EACH_PAGE
def test_every_path_in_the_text_exists(page: Path) -> None:
    folders = "configs|models|datasets|lib|tests|docs|benchmarks"
    text = re.sub(
        r"^```(?:python|diff)\n.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    for path in re.findall(rf"(?<![\w./<])(?:{folders})/[\w./-]*[\w/]", text):
        assert (ROOT / path).exists() or path.endswith("NAME.py"), path


@EACH_PAGE
def test_every_function_in_the_text_is_in_its_file(page: Path) -> None:
    for name, path in re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert re.search(rf"(?:def |class |^){name.split('.')[-1]}\b", text_of(path), re.MULTILINE), f"{name} in {path}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)", text_of("README.md")))
    assert not [page.name for page in PAGES[1:] if page.relative_to(ROOT).as_posix() not in linked]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid_and_opens_with_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#") and "python main.py --cfgs configs/base.yaml" in text
    words = ["configs/base.yaml", *([f"configs/{path.name}"] if path.name != "base.yaml" else [])]
    read_options(["--cfgs", *(str(ROOT / word) for word in words)])
    assert set(yaml.safe_load(text)) <= set(Options.model_fields)


def test_conda_uses_the_requirements_of_pip() -> None:
    content = yaml.safe_load((ROOT / "requirements.yaml").read_text(encoding="utf-8"))
    assert content["dependencies"][-1] == {"pip": ["-r requirements.txt"]}


def test_every_requirement_has_a_comment() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or re.match(r"\S+\s+# \w+", line), line
