"""Duplicates, outliers and wrong labels that were planted among photographs: which of them the findings show.

    python -m benchmarks.findings --data-root data/cifar10-images --work WORK --seeds 0 1 2 --save

For each seed it draws 2,000 training images, plants among them ten each of byte-identical, recompressed (JPEG quality
50) and cropped copies (90 % of each edge, resized back), noise, black and white images, moves 5 % of the photographs
into the folder of another class, and trains a network on all of them (60 epochs of configs/cifar10-cpu.yaml).
``--checkpoint`` also evaluates a network that was trained on other images. Files that exist in ``WORK`` are not made
again. ``--save`` writes benchmarks/results/findings.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import LocalOutlierFactor

from benchmarks import measure
from benchmarks.study import CFGS, ROOT
from lib.config.resolve import resolve
from lib.evaluation import findings
from lib.evaluation.findings import Findings
from lib.evaluation.nearest_neighbours import neighbours_of_arrays
from lib.method.discovery import entropy_and_topk
from lib.training import setup

IMAGES, PLANTED, WRONG, K, TOP = 2000, 10, 0.05, 15, 20
COPIES, OUTLIERS = ("same", "recompressed", "cropped"), ("noise", "black", "white")
SCHEDULE = ("--max-round", "1", "--max-epoch", "60", "--lr-decay-offset", "24", "--lr-decay-step", "12")
LEGEND = """n is the number of planted images: 30 outliers, 100 wrong labels. The last three columns are the place in
the list if only one image of each kind is planted, the median of five such sets for each seed."""
RESULT = Path(__file__).parent / "results" / "findings.md"


def plant(source: Path, target: Path, seed: int) -> None:
    """Fills ``target``/train/<class>/ with photographs and planted images, which are marked by their file names."""
    rng = np.random.default_rng(seed)
    files = sorted((source / "train").glob("*/*"))
    chosen = [files[place] for place in rng.permutation(len(files))[:IMAGES]]
    classes = sorted({file.parent.name for file in files})
    is_wrong = rng.permutation(IMAGES) < round(WRONG * IMAGES)
    for name in classes:
        (target / "train" / name).mkdir(parents=True)
    for number, file in enumerate(chosen):
        label, name = file.parent.name, f"real-{number:05d}"
        if is_wrong[number]:
            label, name = rng.choice([other for other in classes if other != label]), f"{name}-wrong"
        shutil.copyfile(file, target / "train" / label / f"{name}.jpg")
    picks = rng.permutation(np.flatnonzero(~is_wrong))[: len(COPIES) * PLANTED].reshape(len(COPIES), PLANTED)
    for kind, originals in zip(COPIES, picks, strict=True):
        for original in originals:
            file = chosen[original]
            copy_image(kind, file, target / "train" / file.parent.name / f"{kind}-of-{original:05d}.jpg", rng)
    width, height = Image.open(chosen[0]).size
    for kind in OUTLIERS:
        for number in range(PLANTED):
            shape = (height, width, 3)
            values = {"noise": rng.integers(0, 256, shape), "black": np.zeros(shape), "white": np.full(shape, 255)}
            picture = Image.fromarray(values[kind].astype(np.uint8))
            picture.save(target / "train" / rng.choice(classes) / f"{kind}-{number:02d}.png")


def copy_image(kind: str, file: Path, copy: Path, rng: np.random.Generator) -> None:
    """A copy of one of the kinds ``COPIES``."""
    if kind == "same":
        shutil.copyfile(file, copy)
        return
    picture = Image.open(file).convert("RGB")
    if kind == "recompressed":
        picture.save(copy, quality=50)
        return
    width, height = picture.size
    w, h = round(0.9 * width), round(0.9 * height)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    cropped = picture.crop((x, y, x + w, y + h)).resize((width, height), Image.Resampling.BICUBIC)
    cropped.save(copy, quality=90)


def features_of(data: Path, work: Path, seed: int, checkpoint: Path | None) -> Path:
    """The embeddings of a planted folder, by a network trained on it or by the checkpoint."""
    features = work / (f"trained-{seed}.npz" if checkpoint is None else f"checkpoint-{seed}.npz")
    if features.exists():
        return features
    common = ["--cfgs", *CFGS, "--data-root", str(data), "--brief"]
    if checkpoint is None:
        session = work / f"seed{seed}"
        if not (session / "checkpoint").exists():
            run([*common, "--sess-dir", str(work), "--session", session.name, "--seed", str(seed), *SCHEDULE])
        checkpoint = session / "checkpoint" / "latest.ckpt"
    arguments = ["--resume", str(checkpoint), "--test-only", "--protocol", "cluster", "--debug"]
    run([*common, *arguments, "--export-features", str(features)])
    return features


def run(arguments: Sequence[str]) -> None:
    """Runs main.py. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], check=True, cwd=ROOT)


def scores(embeddings: np.ndarray) -> dict[str, np.ndarray]:
    """Candidates for the outlier score (N,) by name; higher: belongs less."""
    entropy, _ = entropy_and_topk(torch.from_numpy(embeddings), temperature=0.1, size=K)
    near = neighbours_of_arrays(embeddings, K)
    copies = findings.identical_images(embeddings, *near)
    distinct, place = np.unique(copies, return_inverse=True)
    candidates = {"lowest entropy (tau = 0.1)": -entropy.numpy()}
    for among, chosen, back in (
        ("all images", np.arange(len(embeddings)), np.arange(len(embeddings))),
        ("distinct images", distinct, place),
    ):
        some = embeddings[chosen]
        nearest, cosines = neighbours_of_arrays(some, K)
        in_degree = np.bincount(nearest.ravel(), minlength=len(some)) + 1e-3 * cosines.mean(axis=1)  # no ties
        factor = -LocalOutlierFactor(n_neighbors=K).fit(some).negative_outlier_factor_
        for name, values in {
            "distance to the Kth neighbour": 1 - cosines[:, -1],
            "mean distance to K neighbours": 1 - cosines.mean(axis=1),
            "fewest reverse neighbours": -in_degree,
            "local outlier factor (scikit-learn)": factor,
            "mean distance to all": -some @ some.mean(axis=0),
        }.items():
            candidates[f"{name}, {among}"] = values[back]
    return candidates | {
        "**simplified local outlier factor, distinct images**": findings.outlier_scores(embeddings, copies, *near)
    }


def judge_outliers(embeddings: np.ndarray, kinds: np.ndarray) -> dict[str, list[float]]:
    """By candidate: AUROC of each kind, then each kind's share in the first n (n: how many were planted)."""
    real, judged = ~np.isin(kinds, OUTLIERS), {}
    for name, values in scores(embeddings).items():
        first = np.argsort(-values, kind="stable")[: int((~real).sum())]
        judged[name] = [
            roc_auc_score(kinds[real | (kinds == kind)] == kind, values[real | (kinds == kind)]) for kind in OUTLIERS
        ]
        judged[name] += [(kinds[first] == kind).sum() / (kinds == kind).sum() for kind in OUTLIERS]
    return judged


def judge_one_of_each(embeddings: np.ndarray, names: np.ndarray, kinds: np.ndarray) -> dict[str, list[float]]:
    """By candidate: the place in the list of each kind, where only one image of it was planted; median of five."""
    places: dict[str, list[list[int]]] = {}
    for number in range(0, PLANTED, 2):
        kept = ~np.isin(kinds, OUTLIERS) | np.char.endswith(names, f"-{number:02d}.png")
        for name, values in scores(embeddings[kept]).items():
            order = kinds[kept][np.argsort(-values, kind="stable")]
            places.setdefault(name, []).append([int((order == kind).argmax()) + 1 for kind in OUTLIERS])
    return {name: [float(value) for value in np.median(rows, axis=0)] for name, rows in places.items()}


def judge_copies(found: Findings, names: np.ndarray, count: int) -> list[float]:
    """Share of the planted copies of each kind that are in a set with their original, in the first ``count`` sets."""
    sets = [each.members for each in findings.nearest_sets(found, count)]
    together = [{str(names[sample]).rpartition(".")[0] for sample in members} for members in sets]
    shares = []
    for kind in COPIES:
        copies = [str(name).rpartition(".")[0] for name in names if str(name).startswith(kind)]
        hits = [any({copy, copy.replace(f"{kind}-of", "real")} <= members for members in together) for copy in copies]
        shares.append(sum(hits) / len(hits))
    return shares


def judge_labels(found: Findings, names: np.ndarray, kinds: np.ndarray) -> list[float]:
    """AUROC of the wrong labels among the photographs, precision in the first n, and in the first 20."""
    assert found.label_disagreement is not None
    real = kinds == "real"
    wrong, values = np.char.find(names[real], "wrong") >= 0, found.label_disagreement[real]
    order = np.argsort(-values, kind="stable")
    return [roc_auc_score(wrong, values), *(wrong[order[:n]].mean() for n in (wrong.sum(), TOP)), 1 - values.mean()]


def judge_pixels(data: Path) -> list[float]:
    """Share of the noise and of the blank images that is recognised, and number of photographs taken for either."""
    context = setup.prepare(
        resolve(["--cfgs", *(str(ROOT / name) for name in CFGS), "--data-root", str(data), "--seed", "0"])
    )
    names = context.splits.train.names
    assert names is not None
    kinds = np.array([Path(name).name.partition("-")[0] for name in names])
    blank, noisy = findings.blank_and_noisy(context.train_statistics().numpy())
    real = ~np.isin(kinds, OUTLIERS)
    return [
        noisy[kinds == "noise"].mean(),
        blank[np.isin(kinds, OUTLIERS[1:])].mean(),
        float((blank | noisy)[real].sum()),
    ]


def text(values: Iterable[float], form: str) -> str:
    """Mean, and the least and the greatest in brackets where they differ."""
    known = list(values)
    low, high = (format(value, form) for value in (min(known), max(known)))
    mean = format(statistics.mean(known), form)
    return mean if low == high else f"{mean} ({low} to {high})"


def tables(files: Sequence[Path]) -> str:
    """Everything measured on the embeddings of several seeds."""
    loaded = [np.load(file) for file in files]
    sets = []
    for arrays in loaded:
        names = np.array([str(name).rpartition("/")[2] for name in arrays["train_names"]])
        kinds = np.array([name.partition("-")[0] for name in names])
        sets.append((arrays["train_embeddings"].astype(np.float32), names, kinds, arrays["train_labels"]))
    found = [findings.find(rows, labels, neighbours=K, resolution=1.0, seed=0) for rows, _, _, labels in sets]
    n = (len(COPIES) * PLANTED + 2, TOP)
    copies = [
        [judge_copies(each, names, count) for each, (_, names, *_) in zip(found, sets, strict=True)] for count in n
    ]
    parts = [
        measure.table(
            ["copies found", *COPIES],
            [
                (f"in the first {count} sets", *(text(v, ".0%") for v in zip(*rows, strict=True)))
                for count, rows in zip(n, copies, strict=True)
            ],
        )
    ]
    many = [judge_outliers(rows, kinds) for rows, _, kinds, _ in sets]
    one = [judge_one_of_each(rows, names, kinds) for rows, names, kinds, _ in sets]
    header = [*(f"{kind}: AUROC" for kind in OUTLIERS), *(f"{kind}: in the first n" for kind in OUTLIERS)]
    rows = []
    for name in many[0]:
        columns = list(zip(*(each[name] for each in many), strict=True))
        alone = list(zip(*(each[name] for each in one), strict=True))
        rows.append(
            (
                name,
                *(text(v, ".2f") for v in columns[:3]),
                *(text(v, ".0%") for v in columns[3:]),
                *(text(v, ".0f") for v in alone),
            )
        )
    header += [f"{kind} alone: place" for kind in OUTLIERS]
    parts.append(measure.table(["outlier score", *header], rows))
    labels = [judge_labels(each, names, kinds) for each, (_, names, kinds, _) in zip(found, sets, strict=True)]
    columns = list(zip(*labels, strict=True))
    header = ["AUROC", "precision, first n", f"precision, first {TOP}", "neighbours with the same label"]
    parts.append(
        measure.table(
            ["wrong labels", *header],
            [("share of other labels", text(columns[0], ".2f"), *(text(v, ".0%") for v in columns[1:]))],
        )
    )
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Prints the tables; exit status 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.findings", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--data-root", type=Path, required=True, help="folder with train/<class>/ of photographs")
    parser.add_argument("--work", type=Path, required=True, help="folder for planted images, sessions and embeddings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one set of planted images each")
    parser.add_argument("--checkpoint", type=Path, help="a network of configs/cifar10-cpu.yaml to evaluate, too")
    parser.add_argument("--save", action="store_true", help=f"write the tables to {RESULT.relative_to(ROOT)}, too")
    given = parser.parse_args(argv)
    networks = {"Trained on these images": None}
    if given.checkpoint:
        networks["A network that saw none of the planted images (--checkpoint)"] = given.checkpoint
    parts = [f"# findings: {(__doc__ or '').splitlines()[0]}"]
    for title, checkpoint in networks.items():
        files = []
        for seed in given.seeds:
            data = given.work / f"planted{seed}"
            if not data.exists():
                plant(given.data_root, data, seed)
            files.append(features_of(data, given.work, seed, checkpoint))
        parts.append(f"## {title}\n\n{tables(files)}")
    pixels = list(zip(*(judge_pixels(given.work / f"planted{seed}") for seed in given.seeds), strict=True))
    row = ("contrast and smoothness", *(text(column, ".0%") for column in pixels[:2]), text(pixels[2], ".0f"))
    header = [
        "by pixels",
        "noise found",
        "black and white found",
        f"of {IMAGES + len(COPIES) * PLANTED:,} others taken for either",
    ]
    parts.append(f"## Without a network\n\n{measure.table(header, [row])}")
    machine = measure.machine(torch.device("cpu"), len(given.seeds)).replace(
        f"{len(given.seeds)} repeats, interleaved, median (least to greatest)",
        f"{len(given.seeds)} sets of planted images, mean (least to greatest)",
    )
    parts += [LEGEND, machine]
    page = "\n\n".join(parts)
    print(page)
    if given.save:
        RESULT.write_text(f"{page}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
