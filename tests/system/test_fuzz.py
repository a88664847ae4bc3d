"""Random options, image folders and checkpoints: the program runs or prints one error line, never a traceback.

By default a fixed set of cases. ``FUZZ=2000 python -m pytest -m slow tests/system/test_fuzz.py`` tries 2,000 new cases
of each kind.
"""

from __future__ import annotations

import datetime
import io
import os
import shutil
import tempfile
import typing
import urllib.error
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from test_main import Tiny
from torchvision.datasets.folder import IMG_EXTENSIONS

import datasets
import main
import models
from lib.config.options import Options, height_and_width
from lib.config.parser import flag
from lib.training import checkpoint

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("FUZZ", "0"))
STATUSES = (0, 1, 2, 3)
"""The exit statuses of docs/reliability.md except those of signals."""
UNSEEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Warnings that Python hides by default."""
FREE = 2**29
"""Bytes of memory that the program sees as free, so that no case fills the memory of the machine."""


def cases(usual: int) -> settings:
    return settings(
        max_examples=CASES or usual,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Ground:
    """The files that all cases start from, made once."""

    photos: Path
    session: Path  # two rounds of one epoch
    files: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A data set, a session trained on it, and files for the options; nothing is downloaded."""
    root = tmp_path_factory.mktemp("ground")
    photos, files = root / "photos", root / "files"
    draw = np.random.default_rng(0)
    for name, count in (("train/dark", 8), ("train/light", 8), ("test/dark", 2), ("test/light", 2)):
        (photos / name).mkdir(parents=True)
        for number in range(count):
            shade = 40 if name.endswith("dark") else 200
            pixels = (shade + draw.integers(-30, 30, (8, 8, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(photos / name / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, "tiny", Tiny)
        patch.setattr(main, "resolve", shortened(main.resolve))
        patch.setattr("urllib.request.urlopen", no_network)
        files.mkdir()
        base = {"dataset": "folder", "data_root": str(photos), "network": "tiny", "size": 8, "resize": 8, "low_dim": 8}
        base |= {"batch_size": 8, "workers_num": 0, "max_round": 2, "max_epoch": 1, "log_tfb": False, "seed": 1}
        base |= {"ANs_select_rate": 0.5, "base_lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
        (files / "base.yaml").write_text(yaml.safe_dump(base))
        (files / "rates.yaml").write_text("0: 0.01\n1: 0.001\n")
        (files / "random").write_bytes(draw.bytes(1000))
        (files / "empty").mkdir()
        shutil.copy(photos / "test/dark/0.png", files / "picture.png")
        model = str(files / "model.safetensors")
        words = ["--cfgs", str(files / "base.yaml"), "--session", "session", "--export-model", model]
        assert run([*words, "--sess-dir", str(root)]).status == 0
        content = torch.load(root / "session/checkpoint/latest.ckpt", weights_only=True)
        torch.save(content, files / "zip.ckpt")
        before = content_of(root)
        yield Ground(photos, root / "session", files)
    assert content_of(root) == before


def shortened(resolve: Callable[[Sequence[str]], Options]) -> Callable[[Sequence[str]], Options]:
    """``resolve`` with smaller values of the options that only make a run longer."""

    def short(argv: Sequence[str]) -> Options:
        options = resolve(argv)
        limits = {"max_round": 3, "max_epoch": 2, "workers_num": 1, "clusters": 50}
        change: dict[str, Any] = {name: most for name, most in limits.items() if most < getattr(options, name)}
        if not_planned(options) and max(height_and_width(options.size)) > 64:
            change |= {"size": 64, "resize": 64}
        return options.model_copy(update={**change, "compile": False})

    return short


def not_planned(options: Options) -> bool:
    """Whether the program does not train, so that no rehearsal takes place."""
    return bool(options.test_only or options.query or isinstance(options.report, Path))


def no_network(*arguments: Any, **more: Any) -> None:
    raise urllib.error.URLError("there is no network")


def content_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextmanager
def case(ground: Ground) -> Iterator[Path]:
    """A new working folder with copies of the ground's files and session."""
    back = Path.cwd()
    with tempfile.TemporaryDirectory(dir=ground.files.parent.parent) as name:
        here = Path(name) / "case"
        shutil.copytree(ground.files, here)
        shutil.copytree(ground.session, here / "session")
        os.chdir(here)
        try:
            yield here
        finally:
            os.chdir(back)


@dataclass(frozen=True)
class Outcome:
    status: object
    out: str
    err: str


def run(words: Sequence[str]) -> Outcome:
    """Runs the program; checks that it raises and warns of nothing and prints one line if it fails."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            status: object = main.main(list(words))
        except SystemExit as end:  # after --help
            status = end.code
    shown, errors = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    assert status in STATUSES, (status, errors)
    assert "Traceback" not in shown + errors
    seen = [warning for warning in warned if not issubclass(warning.category, UNSEEN)]
    assert not seen, [str(warning.message) for warning in seen]
    if status:
        assert errors.startswith("error: ") and errors.endswith("\n") and errors.count("\n") == 1, errors
    else:
        assert not errors, errors
    return Outcome(status, shown, errors)


# Option files and flags.

PLACES = "session session/checkpoint/latest.ckpt zip.ckpt model.safetensors random empty nothing picture.png rates.yaml"
NUMBERS = [0, 1, -1, 2, 3, 8, 10**6, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]
NUMBERS += [0.5, 1.0, -0.0, 1e-3, 1e-45, 1e-320, 1e38, 1e39, 1e308, float("nan"), float("inf"), -float("inf")]
TEXTS = ["", " ", "none", "NULL", "true", "Off", "1e3", "5e-4", "8/0", "1/3", "(8, 8)", "[8]", "0x8", "0x" + "f" * 5000]
TEXTS += [
    "8_0",
    "٣",
    "1,",
    "nan",
    "-1",
    "(",
    "(" * 300,
    "a\nb",
    "\0",
    "é",
    "\ud800",
    "\udcff",
    "\u2028",
    "x" * 300,
    ".",
]
TEXTS += [
    "..",
    "~",
    "*",
    "--size",
    "out.npz",
    "out.safetensors",
    "out.csv",
    "OUT.NPZ/x",
    "0,1",
    "bf16",
    *PLACES.split(),
]

numbers = st.one_of(st.sampled_from(NUMBERS), st.integers(), st.floats(), st.integers(0, 20), st.floats(0, 1))
texts = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(codec=None), max_size=20)).map(
    lambda text: text.lstrip("/")  # no path outside the working folder
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    texts,
    st.binary(max_size=8),
    st.dates(),
    st.datetimes(min_value=datetime.datetime(1, 1, 2)),
)
tuples = st.lists(numbers, min_size=1, max_size=4)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)


def words_of(annotation: Any) -> list[str]:
    """The values of all Literals in a type."""
    found = [word for part in typing.get_args(annotation) for word in words_of(part)]
    return [*typing.get_args(annotation)] if typing.get_origin(annotation) is typing.Literal else found


def known_of(name: str) -> list[Any]:
    """Typical values of an option."""
    field = Options.model_fields[name]
    known = {"dataset": [*datasets.DATASETS], "network": ["tiny", "resnet10", "alexnet", "alexnet-small"]}
    return [Options().model_dump(mode="json")[name], *known.get(name, words_of(field.annotation))]


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Arbitrary values and almost valid ones of an option."""
    return st.one_of(anything, scalars, tuples, st.sampled_from(known_of(name)))


names = st.sampled_from(sorted(Options.model_fields))
settings_of_file = st.lists(names.flatmap(lambda name: st.tuples(st.just(name), values_of(name))), max_size=4).map(dict)


POOL: list[Any] = [None, True, False, *NUMBERS, *TEXTS]
POOL += [[a] * (n - 1) + [b] for n in (2, 3, 4) for a in (0, 0.3, 1e-300, 1e300, 8) for b in (0.5, 1, 9, 1e300, 8192)]
POOL += [[place] for place in PLACES.split()] + [["session", "session/../session"], ["conv1", "fc"], ["knn", "linear"]]
MODES: list[dict[str, Any]] = [
    *[{}] * 3,
    {"resume": "session", "max_round": 3},
    {"resume": "session", "test_only": True},
    {
        "resume": "session",
        "test_only": True,
        "protocol": ["nn", "knn", "linear", "cluster", "graph"],
        "linear_layers": "fc",
    },
    {"resume": "zip.ckpt"},
    {"resume": "session", "query": ["picture.png"]},
    {"test_only": True, "pretrained": "model.safetensors"},
    {"export_features": "out.npz", "export_model": "out.safetensors", "export_table": "out.csv"},
]


def is_legal(name: str, value: Any) -> bool:
    """Whether the value is valid for the option alone."""
    try:
        Options.model_validate({name: value})
    except ValidationError as failure:
        return not any(error["loc"] for error in failure.errors())
    return True


LEGAL = {name: [value for value in [*known_of(name), *POOL] if is_legal(name, value)] for name in Options.model_fields}
legal = st.lists(names.flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(LEGAL[name]))), max_size=3)


def check_places(here: Path, before: set[str], words: object) -> None:
    """Checks that new files are in the sessions' folder or where an option requests them."""
    new = {path.name for path in here.iterdir()} - before
    if not any(name in str(words).replace("-", "_") for name in ("sess_dir", "export_")):
        assert all(name == "sessions" or name.endswith(".evaluation.json") for name in new)
    assert {path.name for path in here.parent.iterdir()} == {here.name} or "sess_dir" in str(words).replace("-", "_")


@cases(100)
@given(values=settings_of_file)
def test_any_option_file_values_give_a_run_or_an_error_line(ground: Ground, values: dict[str, Any]) -> None:
    with case(ground) as here:
        (here / "case.yaml").write_text(yaml.safe_dump(values) if values else "", encoding="utf-8")
        before = {path.name for path in here.iterdir()}
        run(["--cfgs", "base.yaml", "case.yaml"])
        check_places(here, before, values)


@cases(100)
@given(mode=st.sampled_from(MODES), values=legal.map(dict))
@example(mode={}, values={"display_freq": "0x" + "f" * 5000})  # too many digits for Python to print
@example(mode={}, values={"low_dim": 2**31})
@example(mode={}, values={"resume": "x" * 300})
@example(mode={}, values={"report": "x" * 300})
@example(mode={}, values={"query": "x" * 300})
@example(mode={}, values={"network": "alexnet"})  # too large for 8 x 8 pixels
@example(mode={}, values={"size": [8, 1]})
@example(mode={}, values={"weight_decay": 1e39})  # beyond float32
@example(mode={}, values={"lr_decay_rate": 1e30, "lr_decay_offset": 0, "lr_decay_step": 1, "max_epoch": 3})
def test_any_legal_values_give_a_run_or_an_error_line(
    ground: Ground, mode: dict[str, Any], values: dict[str, Any]
) -> None:
    with case(ground) as here:
        (here / "case.yaml").write_text(yaml.safe_dump({**mode, **values, "batch_size": 8}), encoding="utf-8")
        before = {path.name for path in here.iterdir()}
        run(["--cfgs", "base.yaml", "case.yaml"])
        check_places(here, before, {**mode, **values})


written_as = st.one_of(texts, numbers.map(str))
flags = st.tuples(
    st.one_of(names.map(flag), names.map(flag), st.text(max_size=8).map(lambda text: "--" + text)),
    st.lists(written_as, max_size=4),
    st.booleans(),
).map(lambda drawn: [f"{drawn[0]}={''.join(drawn[1][:1])}"] if drawn[2] else [drawn[0], *drawn[1]])


@cases(100)
@given(words=st.lists(flags, max_size=4).map(lambda found: [word for words in found for word in words]))
def test_any_flags_give_a_run_or_an_error_line(ground: Ground, words: list[str]) -> None:
    with case(ground) as here:
        before = {path.name for path in here.iterdir()}
        run(["--cfgs", "base.yaml", *words])
        check_places(here, before, words)


@cases(100)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(st.sampled_from("size:8 \n[]{}&*!|>-?%@`'\"#,\t<=~0x"), max_size=40).map(str.encode),
    )
)
@example(content=b"display_freq: 0x" + b"f" * 5000)
@example(
    content=b"size: [&a [0], " + b"".join(b"&%c [*%c, *%c], " % (n + 1, n, n) for n in range(97, 122)) + b"0]"
)  # 2 ** 25 items
def test_any_bytes_as_option_file_give_a_run_or_an_error_line(ground: Ground, content: bytes) -> None:
    with case(ground) as here:
        (here / "case.yaml").write_bytes(content)
        run(["--cfgs", "base.yaml", "case.yaml"])
        (here / "rates.yaml").write_bytes(content)
        run(["--cfgs", "base.yaml", "--lr-policy", "multistep", "--lr-schedule", "rates.yaml"])


# Folders of images.


def encoded(ending: str, mode: str, size: tuple[int, int]) -> bytes:
    """An image file."""
    file = io.BytesIO()
    kind = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(ending, ending.upper())
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    more: dict[str, Any] = {}
    if kind in ("PNG", "TIFF", "JPEG", "WEBP"):
        exif = Image.Exif()
        exif[274] = 6  # rotated
        more = {"exif": exif.tobytes()}
    try:
        Image.fromarray(pixels).convert(mode).save(file, kind, **more)
    except (OSError, KeyError, ValueError):  # the format does not support the mode
        Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def damaged(content: bytes, cut: float | None, flips: Sequence[tuple[float, int]]) -> bytes:
    """Truncated to a share of the length, with bits flipped at relative places from 0 to 1."""
    result = bytearray(content if cut is None else content[: int(len(content) * cut)])
    for place, bit in flips if result else ():
        result[int(len(result) * place)] ^= 1 << bit
    return bytes(result)


places = st.floats(0, 1, exclude_max=True)
damages = st.tuples(
    st.none() | places, st.lists(st.tuples(places | places.map(lambda p: p / 8), st.integers(0, 7)), max_size=3)
)
formats = "png jpg bmp tiff webp gif ppm".split()
images = st.tuples(
    st.sampled_from(formats),
    st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK", "1", "I", "I;16", "F", "LA"]),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
files = st.one_of(
    st.binary(max_size=100),
    st.tuples(
        st.sampled_from(
            [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"GIF89a", b"P6 9 9 255\n", b"RIFF"]
        ),
        st.binary(max_size=60),
    ).map(b"".join),
    st.tuples(images, damages).map(lambda drawn: damaged(encoded(*drawn[0]), *drawn[1])),
    images.map(lambda drawn: encoded(*drawn)),
)
links = st.sampled_from(["", ".", "..", "missing", "/dev/null", "../dark/good0.png"])
LAYOUTS = [
    ["train/dark", "train/light", "test/dark"],
    ["train/a\nb", "train/\udcff", "test/a\nb"],
    ["train", "test"],
    [".", "inner", "a.png"],
    ["train/dark", "train", "test/new", "val", ".", "a.png", "train/.hidden"],
]
file_names = st.integers(0, 99).map(str) | st.text(st.characters(exclude_characters="/\0", codec=None), max_size=12)
folders = st.sampled_from(LAYOUTS).flatmap(
    lambda layout: st.lists(
        st.tuples(
            st.sampled_from(layout),
            file_names,
            st.sampled_from([*IMG_EXTENSIONS, ".PNG", ".txt", ""]),
            st.one_of(files, files, files, st.none(), links),
        ),
        min_size=1,
        max_size=8,
    )
)


def lay_out(root: Path, entries: Sequence[tuple[str, str, str, bytes | str | None]]) -> None:
    """Creates files (bytes), folders (None) and links (text) as far as the file system allows them."""
    for folder, name, ending, content in entries:
        path = root / folder / f"{name}{ending}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.symlink_to(content or path.name)
        except (OSError, ValueError):
            continue


@cases(50)
@given(
    entries=folders,
    good=st.sampled_from([0, 2, 8, 8]),
    words=st.sampled_from(["", "", "--strict-data", "--scale 0.5 1", "--test-only --protocol cluster --clusters 2"]),
)
@example(entries=[("train/dark", "large", ".ppm", b"P6 9500 9500 255\n")], good=8, words="")
def test_any_image_folder_gives_a_run_or_an_error_line(
    ground: Ground, entries: list[Any], good: int, words: str
) -> None:
    with case(ground) as here:
        picture = (ground.files / "picture.png").read_bytes()
        lay_out(here / "images", [(entries[0][0], f"good{number}", ".png", picture) for number in range(good)])
        lay_out(here / "images", entries)
        run(["--cfgs", "base.yaml", "--data-root", "images", "--batch-size", "2", *words.split()])


# Checkpoints and sessions.


damaged_files = st.one_of(
    st.tuples(st.integers(0, 99).map(lambda percent: percent / 100), st.just([])),
    st.tuples(
        st.none(), st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=4, unique_by=lambda flip: flip)
    ),
).map(tuple)


@cases(100)
@given(damage=damaged_files)
def test_damaged_checkpoint_is_refused_or_the_previous_one_used(
    ground: Ground, damage: tuple[float | None, list[tuple[float, int]]]
) -> None:
    with case(ground) as here:
        latest = here / "session/checkpoint/latest.ckpt"
        whole = latest.read_bytes()
        latest.write_bytes(damaged(whole, *damage))
        if latest.read_bytes() == whole:
            return
        assert run(["--cfgs", "base.yaml", "--resume", str(latest), "--test-only"]).status == 2
        assert run(["--cfgs", "base.yaml", "--resume", str(latest)]).status == 2
        went_on = run(["--resume", "session", "--max-round", "3"])
        assert went_on.status == 0 and "resuming from the previous checkpoint" in went_on.out
        assert checkpoint.load(latest)["round"] == 2


@cases(100)
@given(name=st.sampled_from(["zip.ckpt", "model.safetensors"]), damage=damaged_files, train=st.booleans())
def test_damaged_weights_file_gives_a_run_or_an_error_line(
    ground: Ground, name: str, damage: tuple[float | None, list[tuple[float, int]]], train: bool
) -> None:
    with case(ground) as here:
        (here / name).write_bytes(damaged((here / name).read_bytes(), *damage))
        words = ["--max-round", "3"] if train else ["--test-only", "--protocol", "knn", "linear", "cluster"]
        run(["--cfgs", "base.yaml", "--resume", name, "--linear-layers", "fc", *words])


@cases(25)
@given(
    name=st.sampled_from(["config.yaml", "metrics.jsonl", "starts.jsonl", "log.txt"]),
    damage=damaged_files | st.binary(max_size=60),
    words=st.sampled_from(["", "", "--cfgs base.yaml", "--test-only", "--debug", "--restart", "--report"]),
)
@example(name="metrics.jsonl", damage=b"\x80", words="")
@example(name="metrics.jsonl", damage=b"[" * 100_000, words="")
@example(name="config.yaml", damage=b"\x80", words="--cfgs base.yaml")
def test_damaged_session_files_never_end_in_a_traceback(ground: Ground, name: str, damage: Any, words: str) -> None:
    with case(ground) as here:
        path = here / "session" / name
        words += " --sess-dir sessions"
        path.write_bytes(damage if isinstance(damage, bytes) else damaged(path.read_bytes(), *damage))
        run(["--resume", "session", "--max-round", "3", *words.split()])
        run(["--compare", "session"])
