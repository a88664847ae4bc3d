"""Which options beyond the paper give better embeddings for the same number of image passes: a screening on a CPU.

    python -m benchmarks.screening --data-root data/cifar10-images --sess-dir SCREEN --results RESULTS --jobs 2

Short runs of ``configs/cifar10-cpu.yaml``: 30 image passes over 20,000 of the training images. They are evaluated by
kNN on 5,000 other training images, so that settings are chosen without the test images. Both sets are the same for all
runs: links to them are in ``SCREEN/images``. Runs are stopped, resumed and listed like those of
``benchmarks/study.py``.

``RESULTS/screening.jsonl`` gets one line for each finished run: kNN of the last epoch against the memory bank
(``knn_bank``) and by recomputed conv5 features (``knn_conv5``), image passes, images/s, commit and processor. Lines of
other machines and commits are kept. ``--evaluate`` adds the linear probe and the graph clustering of conv5 to the lines
of finished runs, and a line for each ``SCREEN/simclr-sN``, which is trained by

    python -m benchmarks.simclr --data-root SCREEN/images --out SCREEN/simclr-s0 --seed 0 --passes 30

``--table`` shows the mean over the seeds of each arm.

Most arms have one round of 30 passes, with instance loss, and change one thing of ``one-round``; those named after
several options have all of them, and ``together`` has four. ``round0`` is the first 18 passes of the arms that follow
it and discover neighbourhoods in four more rounds of 3 passes. ``and-cosine`` and ``view-loss-cosine-and``
have five rounds of 6 passes, with one schedule over all of them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import mean_and_deviation, read_lines, table
from benchmarks.study import (
    CFGS,
    CONV5,
    COSINE,
    COSINE_OF_RUN,
    ROOT,
    VIEW_LOSS,
    Arm,
    Run,
    Study,
    carry_out,
    epochs_of,
    new_network,
    parser_of,
    schedule,
)
from lib.errors import UsageError
from lib.session import metrics, provenance
from lib.session.atomic_files import atomic_write

SEEDS = (0, 1, 2)
PASSES = 30
FIRST_EPOCHS, EPOCHS, ROUNDS = 18, 3, 5
"""Epochs of round 0, epochs of each later round, and rounds, of the arms that discover neighbourhoods."""
TRAIN, HELD_OUT = 20_000, 5_000
"""Number of images to train on, and of training images to evaluate on."""
COMMON = (*CONV5, "--keep", "last", "--log-tfb", "false")
RESULTS = "screening.jsonl"
FIGURES = {
    "knn_bank": "kNN, bank, %",
    "knn_conv5": "kNN, conv5, %",
    "linear": "linear, conv5, %",
    "graph_nmi": "graph, NMI, %",
    "images_per_s": "images/s",
}
"""Figure of a line -> column title."""
FLIP = ("--random-horizontal-flip",)
MLP = ("--head", "mlp")
HUE = ("--colorjitter", "0.4", "0.4", "0.4", "0.1")
"""SimCLR's shift of the hue; the reference's is 0.4."""
BANK_TEMPERATURE = ("--npc-temperature", "0.14", "--knn-sigma", "0.1")
"""1.4 times the reference's in the loss; kNN as before."""
DECAY = ("--weight-decay", "0.0001")
"""A fifth of the reference's."""
CROP, SMALL_CROP = ("--scale", "0.4", "1"), ("--scale", "0.08", "1")
"""Crops of at least 40 % and 8 % of the image; the reference's have at least 20 %."""
RATE, LOW_RATE = ("--base-lr", "0.06"), ("--base-lr", "0.015")
"""Twice and half the reference's learning rate."""
TEMPERATURE, LOW_TEMPERATURE = ("--view-temperature", "0.2"), ("--view-temperature", "0.05")
"""Twice and half the default."""


def _view_loss_cosine(*flags: str) -> Arm:
    """The loss between two views with a cosine schedule, and more options."""
    return Arm((*VIEW_LOSS, *COSINE, *flags), views=2, has_schedule=True)


ARMS: dict[str, Arm] = {
    "one-round": Arm(),
    "restarts": Arm(("--ANs-select-rate", "0"), branches=True),
    "and": Arm(branches=True),
    "cosine": Arm(COSINE, has_schedule=True),
    "flip": Arm(FLIP),
    "views": Arm(("--views", "2"), views=2),
    "view-loss": Arm(VIEW_LOSS, views=2),
    "mlp": Arm(MLP),
    "early-size": Arm(("--early-size", "12", "--early-share", "0.4")),
    "cosine-warm-up": Arm((*COSINE, "--lr-warmup-epochs", "3"), has_schedule=True),
    "and-k5": Arm(("--ANs-size", "5"), branches=True),
    "and-growing": Arm(("--ANs-size", "5", "--ANs-size-first", "1"), branches=True),
    "and-reciprocal": Arm(("--ANs-reciprocal-first",), branches=True),
    "and-weighted": Arm(("--ANs-size", "5", "--loss", "similarity-weighted"), branches=True),
    "and-every-epoch": Arm(("--ANs-every", "1"), branches=True),
    "and-entropy": Arm(("--entropy-loss", "0.2"), branches=True),
    "and-cosine": Arm(COSINE_OF_RUN, rounds=ROUNDS, has_schedule=True),
    "view-loss-flip": Arm((*VIEW_LOSS, *FLIP), views=2),
    "view-loss-mlp": Arm((*VIEW_LOSS, *MLP), views=2),
    "view-loss-cosine": _view_loss_cosine(),
    "together": Arm((*VIEW_LOSS, *FLIP, *MLP, *COSINE), views=2, has_schedule=True),
    "view-loss-3": Arm(("--views", "2", "--view-loss", "3"), views=2),
    "view-loss-cosine-hue": _view_loss_cosine(*HUE),
    "view-loss-cosine-rate": _view_loss_cosine(*RATE),
    "view-loss-cosine-temperature": _view_loss_cosine(*TEMPERATURE),
    "view-loss-cosine-temperatures": _view_loss_cosine(*TEMPERATURE, *BANK_TEMPERATURE),
    "view-loss-cosine-bank-temperature": _view_loss_cosine(*BANK_TEMPERATURE),
    "view-loss-cosine-low-temperature": _view_loss_cosine(*LOW_TEMPERATURE),
    "view-loss-cosine-decay": _view_loss_cosine(*DECAY),
    "hue": Arm(HUE),
    "view-loss-cosine-hue-low-rate": _view_loss_cosine(*HUE, *LOW_RATE),
    "view-loss-cosine-hue-crop": _view_loss_cosine(*HUE, *CROP),
    "view-loss-cosine-hue-small-crop": _view_loss_cosine(*HUE, *SMALL_CROP),
    "view-loss-cosine-and": Arm((*VIEW_LOSS, *COSINE_OF_RUN), views=2, rounds=ROUNDS, has_schedule=True),
}


def plan(seeds: Sequence[int], arms: Sequence[str]) -> list[Run]:
    """The runs of these arms, and ``round0`` if one branches from it, seed by seed."""

    def run(name: str, seed: int) -> Run:
        arm = ARMS[name]
        if not arm.branches:
            return new_network(name, arm, seed, PASSES, COMMON)
        flags = ("--max-round", str(ROUNDS), *schedule(EPOCHS), *arm.flags)
        return Run(f"{name}-s{seed}", flags, f"round0-s{seed}", (ROUNDS - 1, EPOCHS - 1))

    def round_0(seed: int) -> Run:
        flags = ("--seed", str(seed), *COMMON, "--max-round", "1", *schedule(FIRST_EPOCHS))
        return Run(f"round0-s{seed}", flags, None, (0, FIRST_EPOCHS - 1))

    runs: list[Run] = []
    for seed in seeds:
        first = [round_0(seed)] if any(ARMS[name].branches for name in arms) else []
        runs += [*first, *(run(name, seed) for name in arms)]
    return runs


def choose_images(data_root: Path, folder: Path, train: int = TRAIN, held_out: int = HELD_OUT) -> None:
    """Makes ``folder`` with links to training images: ``train/<class>/`` to train on, ``test/<class>/`` to evaluate on.

    The same share of each class is drawn from the sorted names with a fixed seed. An existing folder is kept.

    Raises:
        UsageError: there are too few images, or the folder cannot be written.
    """
    if folder.is_dir():
        return
    classes = {here.name: sorted(here.iterdir()) for here in sorted((data_root / "train").glob("*")) if here.is_dir()}
    total = sum(map(len, classes.values()))
    if total < train + held_out:
        raise UsageError(
            f"{data_root}: has {total} training images in folders train/<class>/, and the screening needs "
            f"{train + held_out}; name the folder of another data set"
        )
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    draw = np.random.default_rng(0)
    for name, paths in classes.items():
        order = draw.permutation(len(paths))
        counts = [round(count * len(paths) / total) for count in (train, held_out)]
        chosen = {"train": order[: counts[0]], "test": order[counts[0] : sum(counts)]}
        for split, numbers in chosen.items():
            (part / split / name).mkdir(parents=True)
            for number in numbers:
                (part / split / name / paths[number].name).symlink_to(paths[number].resolve())
    part.rename(folder)


class Screening(Study):
    """The runs of the screening; a finished one adds a line to the results.

    Args:
        data_root, sess_dir, runs: as in ``Study``.
        results: folder of ``screening.jsonl``.
    """

    def __init__(self, data_root: Path, sess_dir: Path, runs: Sequence[Run], results: Path) -> None:
        super().__init__(data_root, sess_dir, runs)
        self.results = results

    def line_of(self, run: Run) -> dict[str, Any]:
        """The line of a finished run."""
        rows, starts = epochs_of(self.sess_dir / run.name), metrics.starts(self.sess_dir / run.name)
        last = rows[-1]
        arm, _, seed = run.name.rpartition("-s")
        return {
            "arm": arm,
            "seed": int(seed),
            "passes": last["passes"],
            "knn_bank": last["top1"],
            "knn_conv5": last["embed_top1"],
            "loss": last["loss"],
            "consistency": last["consistency"],
            "images_per_s": round(statistics.median(row["images_per_s"] for row in rows), 1),
            "flags": " ".join(run.flags),
            "started": starts[0]["time"],
            "commits": list(dict.fromkeys(start["commit"] for start in starts)),
            "processor": provenance.processor(),
        }

    def finished(self, run: Run) -> None:
        """Adds the line of a run."""
        self.add(self.line_of(run))

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line to the results, or its new values to the line of the same run."""
        lines, key = read_lines(self.results / RESULTS), ("arm", "seed", "started")
        for old in lines:
            if all(old[name] == line[name] for name in key):
                old |= line
                break
        else:
            lines.append(line)
        self.results.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.results / RESULTS) as file:
            file.write("".join(json.dumps(each) + "\n" for each in lines).encode("utf-8"))

    def evaluate(self) -> None:
        """Linear probe and graph clustering of all finished runs that have none yet."""
        for run in self.runs:
            if self.is_done(run):
                session = self.sess_dir / run.name
                found = figures_of(["--resume", str(session)], session / "evaluation.json")
                self.add({**self.line_of(run), **found})
        for folder in sorted(self.sess_dir.glob("simclr-s*")):
            rows = read_lines(folder / metrics.METRICS)
            if not rows or (last := rows[-1])["passes"] < PASSES:
                continue
            words = ["--cfgs", *CFGS, "--data-root", str(self.data_root), "--resume", str(folder / "latest.ckpt")]
            line = {
                "arm": "simclr",
                "seed": int(folder.name.rpartition("-s")[2]),
                "passes": last["passes"],
                "knn_conv5": last["knn_backbone"],
                "images_per_s": round(statistics.median(row["image_passes_per_s"] for row in rows), 1),
                "started": "",
            }
            self.add({**line, **figures_of([*words, "--embed", "conv5"], folder / "latest.evaluation.json")})

    def add_missing(self) -> None:
        """Adds the missing lines of finished runs, if an earlier screening was killed."""
        for run in self.runs:
            if self.is_done(run):
                self.finished(run)


def figures_of(words: Sequence[str], path: Path) -> dict[str, float]:
    """Figures of a test run with these words, which writes them to ``path`` unless they are there."""
    if not path.is_file():
        flags = ["--test-only", "--protocol", "linear", "graph", "--linear-layers", "conv5", "--gpus", ""]
        subprocess.run([sys.executable, "main.py", "--brief", *words, *flags], cwd=ROOT, check=True)
    linear, graph = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {"linear": linear["top1"], **{f"graph_{name}": graph[name] for name in ("groups", "nmi", "ari", "accuracy")}}


def summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation of each arm over its runs, in Markdown, best ``knn_conv5`` first."""
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        arms.setdefault(line["arm"], []).append(line)
    rows = []
    for arm, own in sorted(arms.items(), key=lambda item: -statistics.mean(line["knn_conv5"] for line in item[1])):
        cells = []
        for name in FIGURES:
            factor = 1 if name == "images_per_s" else 100
            cells.append(mean_and_deviation([factor * line[name] for line in own if name in line]))
        rows.append((arm, len(own), f"{statistics.mean(line['passes'] for line in own):g}", *cells))
    return table(["arm", "runs", "passes", *FIGURES.values()], rows)


def main(argv: Sequence[str]) -> int:
    """Exit status as ``benchmarks.study.carry_out``, and 2 for unusable input."""
    parser = parser_of("benchmarks.screening", __doc__, SEEDS, list(ARMS))
    parser.add_argument("--results", type=Path, required=True, help="folder of screening.jsonl")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the finished runs, and stop")
    parser.add_argument("--table", action="store_true", help="show the mean of each arm, and stop")
    given = parser.parse_args(argv)
    if given.table:
        print(summary(read_lines(given.results / RESULTS)))
        return 0
    images = given.sess_dir / "images"
    screening = Screening(images, given.sess_dir, plan(given.seeds, given.arms), given.results)
    if given.list:
        print(screening.progress())
        return 0
    try:
        given.sess_dir.mkdir(parents=True, exist_ok=True)
        choose_images(given.data_root, images, TRAIN, HELD_OUT)
        screening.add_missing()
        if given.evaluate:
            screening.evaluate()
            return 0
        return carry_out(screening, given.jobs)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
