"""The figures, tables and plots of the study (``benchmarks/study.py``), from its finished runs.

    python -m benchmarks.study_results --data-root data/cifar10-images --sess-dir STUDY --results RESULTS

``RESULTS`` gets the metrics of each epoch (NAME.jsonl), the figures of the last checkpoint (NAME.json), ``tables.md``,
``knn.png`` and ``consistency.png``. Runs with figures there are not evaluated again, and runs of other machines are
kept, so that results can be collected from several.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import stats

import datasets
import models
from benchmarks import measure
from benchmarks.study import (
    ARMS,
    CFGS,
    FIRST_EPOCHS,
    NAMES,
    ROUNDS,
    SEEDS,
    Run,
    epochs_of,
    plan,
    total_epochs,
    views_of,
)
from lib.config.options import height_and_width
from lib.config.parser import read_options
from lib.config.resolve import resolve
from lib.errors import UsageError
from lib.evaluation import graph_clustering, linear_probe
from lib.evaluation.knn import top_k_accuracy, weighted_knn
from lib.evaluation.nearest_neighbours import nearest_neighbours
from lib.method.discovery import entropy_and_topk
from lib.session import metrics
from lib.session.atomic_files import atomic_write
from lib.training import setup

PEER = "simclr"
SHARES = [percent / 100 for percent in range(5, 101, 5)]
"""Shares of the samples of lowest entropy, for which the consistency is computed."""
TITLES = {
    "knn_bank": "kNN, bank",
    "nn_bank": "NN, bank",
    "knn": "kNN, recomputed",
    "nn": "NN, recomputed",
    "knn_conv5": "kNN, conv5",
    "linear_conv5": "linear, conv5",
    "graph_nmi": "graph, conv5, NMI",
    "kept": "neighbours kept",
}
"""Figure of a run -> column title; all are shares."""
TESTED = ("knn_bank", "knn", "linear_conv5")
"""Figures whose differences to ``restarts`` are tabulated."""
Figures = dict[str, Any]


def evaluate(context: setup.RunContext, network: torch.nn.Module, bank: torch.Tensor | None) -> Figures:
    """The figures of a network and, if it has one, of its memory bank (N, D).

    ``knn_conv5`` uses the globally pooled features before the last layer, as is usual for methods with a projection
    head, and ``graph_nmi`` is that of the graph clustering of the training images by them. ``correct`` has a bit for
    each test image: whether the recomputed kNN classifies it correctly.
    """
    splits, options, classes = context.splits, context.options, len(context.splits.train.classes)
    assert splits.test is not None and splits.train.labels is not None and splits.test.labels is not None
    labels, test_labels = torch.from_numpy(splits.train.labels), torch.from_numpy(splits.test.labels)
    stages = [
        linear_probe.extract_stages(network, context.loader(split, train=False), ("conv5", "fc"), "features")
        for split in (splits.train, splits.test)
    ]
    pooled = [F.normalize(each["conv5"].unflatten(1, (network_width(network), -1)).mean(dim=2)) for each in stages]

    def accuracy(queries: torch.Tensor, rows: torch.Tensor, k: int = options.knn_k) -> tuple[float, torch.Tensor]:
        sigma = options.knn_sigma or options.npc_temperature
        scores = weighted_knn(queries, rows, labels, classes=classes, k=k, sigma=sigma)
        return top_k_accuracy(scores, test_labels, 1), scores.argmax(dim=1) == test_labels

    found: Figures = {"knn_conv5": accuracy(pooled[1], pooled[0])[0]}
    probed = linear_probe.probe(
        stages[0]["conv5"],
        labels,
        stages[1]["conv5"],
        test_labels,
        classes=classes,
        seed=0,
        device=context.device,
        what="linear probe",
    )
    found["linear_conv5"] = probed.top1
    nearest = nearest_neighbours(pooled[0], options.graph_neighbours).samples.numpy()
    groups = graph_clustering.cluster(
        pooled[0].numpy(), nearest, splits.train.labels, resolution=options.graph_resolution, seed=0
    )
    found["graph_nmi"] = groups.figures["nmi"]
    if bank is None:
        return found
    test = stages[1]["fc"]
    found["knn"], correct = accuracy(test, stages[0]["fc"])
    found["nn"], _ = accuracy(test, stages[0]["fc"], k=1)
    found["knn_bank"], _ = accuracy(test, bank)
    found["nn_bank"], _ = accuracy(test, bank, k=1)
    found["correct"] = base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()
    return {**found, **neighbour_figures(bank, labels, classes, options.npc_temperature)}


def network_width(network: torch.nn.Module) -> int:
    """Channels of the last stage."""
    head = network.linear
    return int((head[0] if isinstance(head, torch.nn.Sequential) else head).in_features)  # type: ignore[union-attr, arg-type]


def neighbour_figures(bank: torch.Tensor, labels: torch.Tensor, classes: int, temperature: float) -> Figures:
    """How often the nearest neighbour of a row of the bank has its class, and how the entropy predicts that.

    Returns:
        ``consistency_by_quartile`` of the entropy, lowest first; ``consistency_of_share`` of the samples of lowest
        entropy, by ``SHARES``; ``rank_correlation`` of entropy and correctness (Spearman); ``pairs``, counts of
        (class, neighbour's class).
    """
    entropy, nearest = entropy_and_topk(bank, temperature=temperature, size=1)
    order, neighbour = entropy.sort(stable=True).indices, labels[nearest[:, 0]]
    is_correct = (neighbour == labels)[order].double()
    counts = [round(share * len(order)) for share in SHARES]
    pairs = torch.zeros(classes, classes, dtype=torch.long)
    pairs.index_put_((labels, neighbour), torch.ones(len(labels), dtype=torch.long), accumulate=True)
    return {
        "consistency_by_quartile": [part.mean().item() for part in is_correct.tensor_split(4)],
        "consistency_of_share": [is_correct[:count].mean().item() for count in counts],
        "rank_correlation": float(stats.spearmanr(entropy[order], is_correct).statistic),
        "pairs": pairs.tolist(),
    }


def evaluate_run(session: Path, data_root: Path) -> Figures:
    """``evaluate`` of a run's latest checkpoint."""
    words = ["--resume", str(session), "--data-root", str(data_root), "--test-only", "--gpus", ""]
    context = setup.prepare(resolve(words))
    setup.load_network(context)
    return evaluate(context, context.network, context.loaded["npc"]["memory"])


def evaluate_peer(folder: Path, data_root: Path) -> Figures:
    """``evaluate`` of a run of ``benchmarks/simclr.py``."""
    context = setup.prepare(read_options(["--cfgs", *CFGS, "--data-root", str(data_root), "--debug", "--gpus", ""]))
    options = context.options
    network = models.build(options.network, low_dim=options.low_dim, size=height_and_width(options.size))
    network.load_state_dict(torch.load(folder / "latest.ckpt", weights_only=True)["net"])
    return evaluate(context, network, None)


def collect(data_root: Path, sess_dir: Path, runs: Sequence[Run], results: Path) -> None:
    """Copies metrics of finished runs to ``results``, and evaluates those that have no figures there yet."""
    results.mkdir(parents=True, exist_ok=True)
    for run in runs:
        rows, out = epochs_of(sess_dir / run.name), results / f"{run.name}.json"
        if rows and (rows[-1]["round"], rows[-1]["epoch"]) == run.last:
            with atomic_write(results / f"{run.name}.jsonl") as file:  # repeated epochs count once
                file.write("".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"))
            if not out.exists():
                _write(out, {**evaluate_run(sess_dir / run.name, data_root), "kept": rows[-1]["kept"]})
    for folder in sorted(sess_dir.glob(f"{PEER}-s*")):
        rows = measure.read_lines(folder / metrics.METRICS)
        if rows and rows[-1]["passes"] > total_epochs() - 1:
            shutil.copyfile(folder / metrics.METRICS, results / f"{folder.name}.jsonl")
            if not (out := results / f"{folder.name}.json").exists():
                _write(out, evaluate_peer(folder, data_root))


def _write(path: Path, figures: Figures) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(figures) + "\n").encode("utf-8"))
    print(f"evaluated: {path.stem}", file=sys.stderr, flush=True)


class Results:
    """The results collected by ``collect``.

    Attributes:
        epochs: arm -> seed -> rows of metrics.jsonl.
        figures: arm -> seed -> figures of the last checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.epochs: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.figures: dict[str, dict[str, Figures]] = {}
        for arm in ("round0", *NAMES, PEER):
            for path in sorted(folder.glob(f"{arm}-s*.json*")):
                seed = path.stem.rpartition("-s")[2]
                if path.suffix == ".jsonl":
                    self.epochs.setdefault(arm, {})[seed] = measure.read_lines(path)
                else:
                    self.figures.setdefault(arm, {})[seed] = json.loads(path.read_text(encoding="utf-8"))

    def tables(self) -> str:
        """All tables in Markdown, in percent or points; mean ± standard deviation over the seeds."""
        text = [self._by_round("top1", "weighted kNN against the memory bank, last epoch of each round, %")]
        text.append(self._by_round("consistency", "consistency of the anchors' neighbours, %"))
        text.append(self._final())
        text += [table for figure in TESTED if (table := self._differences(figure))]
        text += [table for table in (self._quartiles(), self._mcnemar(), self._peer()) if table]
        return "\n\n".join(text)

    def _by_round(self, figure: str, title: str) -> str:
        rows = []
        for arm, seeds in self.epochs.items():
            if arm == PEER:
                continue
            ends = [{row["round"]: row[figure] for row in rows} for rows in seeds.values()]
            columns = [[100 * end[number] for end in ends if end.get(number) is not None] for number in range(ROUNDS)]
            if any(columns):
                rows.append((arm, len(ends), *map(measure.mean_and_deviation, columns)))
        header = ["arm", "seeds", *(f"round {number}" for number in range(ROUNDS))]
        return f"{title}\n\n{measure.table(header, rows)}"

    def _final(self) -> str:
        rows = []
        for arm, seeds in self.figures.items():
            columns = [[100 * own[name] for own in seeds.values() if own.get(name) is not None] for name in TITLES]
            rows.append((arm, len(seeds), *map(measure.mean_and_deviation, columns)))
        return f"last epoch, %\n\n{measure.table(['arm', 'seeds', *TITLES.values()], rows)}"

    def _differences(self, figure: str) -> str:
        base = self._values(figure, "restarts")
        rows = []
        for arm in NAMES:
            own = self._values(figure, arm)
            both = sorted(own.keys() & base.keys())
            if arm != "restarts" and both:
                rows.append((arm, ", ".join(both), *interval([100 * (own[seed] - base[seed]) for seed in both])))
        header = ["arm", "seeds", "minus restarts, points", "95 % interval"]
        return f"paired differences: {TITLES[figure]}\n\n{measure.table(header, rows)}" if rows else ""

    def _values(self, figure: str, arm: str) -> dict[str, float]:
        """Seed -> value at the end; kNN against the bank is in the metrics, too."""
        if figure == "knn_bank":
            return {seed: rows[-1]["top1"] for seed, rows in self.epochs.get(arm, {}).items()}
        return {seed: own[figure] for seed, own in self.figures.get(arm, {}).items()}

    def _quartiles(self) -> str:
        rows = []
        for arm, seeds in self.figures.items():
            values = [own for own in seeds.values() if "consistency_by_quartile" in own]
            if values:
                quartiles = zip(*(own["consistency_by_quartile"] for own in values), strict=True)
                correlation = measure.mean_and_deviation([own["rank_correlation"] for own in values])
                rows.append(
                    (
                        arm,
                        len(values),
                        *(measure.mean_and_deviation([100 * value for value in part]) for part in quartiles),
                        correlation,
                    )
                )
        header = ["arm", "seeds", "lowest entropy", "second", "third", "highest", "rank correlation"]
        title = "consistency of all samples' nearest neighbours at the end, by quartile of their entropy, %"
        return f"{title}\n\n{measure.table(header, rows)}" if rows else ""

    def _mcnemar(self) -> str:
        """McNemar's exact test of each arm against restarts, on the test images of each seed."""
        rows = []
        base = self.figures.get("restarts", {})
        for arm, seeds in self.figures.items():
            for seed in sorted(seeds.keys() & base.keys()):
                if arm in ("restarts", "round0") or "correct" not in seeds[seed]:
                    continue
                own, other = (_bits(each[seed]["correct"]) for each in (seeds, base))
                gained, lost = int((own & ~other).sum()), int((other & ~own).sum())
                chance = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
                rows.append((arm, seed, gained, lost, f"{chance:.2g}"))
        header = ["arm", "seed", "correct here alone", "correct with restarts alone", "p (McNemar, exact)"]
        return f"kNN, recomputed: test images against restarts\n\n{measure.table(header, rows)}" if rows else ""

    def _peer(self) -> str:
        """SimCLR and the arms, with the images that pass through the network in a second."""
        rows = []
        for seed, epochs in self.epochs.get(PEER, {}).items():
            judged = [row for row in epochs if "knn_backbone" in row]
            own = self.epochs.get("and", {}).get(seed, [])
            branch = self.epochs.get("round0", {}).get(seed, [])
            if not judged or not own:
                continue
            seconds = sum(row["train_s"] for row in [*branch, *own])
            within = [row for row in judged if row["train_s"] <= seconds] or judged[:1]
            rates = statistics.median(row["image_passes_per_s"] for row in epochs)
            ours = statistics.median(row["images_per_s"] for row in own)
            cells = [(f"{row['passes']:.0f}", f"{row['knn_backbone']:.2%}") for row in (judged[-1], within[-1])]
            rows.append((seed, *cells[0], *cells[1], f"{rates:.0f}", f"{ours:.0f}"))
        header = ["seed", "passes", "kNN, conv5", "passes in the seconds of and", "kNN, conv5", "its images/s", "ours"]
        return f"SimCLR\n\n{measure.table(header, rows)}" if rows else ""

    def knn_plot(self) -> Figure:
        """kNN over image passes: a line for the mean of each arm, and a band from minimum to maximum."""
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        start = dict.fromkeys(ARMS, FIRST_EPOCHS)
        for arm, seeds in self.epochs.items():
            if arm == PEER:
                continue
            values = 100 * np.array([[row["top1"] for row in rows] for rows in seeds.values()])
            passes = start.get(arm, 0) + views_of(arm) * (1 + np.arange(values.shape[1]))
            (line,) = axes.plot(passes, values.mean(axis=0), label=f"{arm} ({len(values)})", linewidth=1.3)
            axes.fill_between(passes, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15)
        axes.set(xlabel="image passes", ylabel="weighted kNN, %", title="Test accuracy against the memory bank (seeds)")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def consistency_plot(self) -> Figure:
        """Consistency of the samples of lowest entropy against their share, at the end of each arm."""
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for arm, seeds in self.figures.items():
            curves = [own["consistency_of_share"] for own in seeds.values() if "consistency_of_share" in own]
            if curves:
                means = 100 * np.mean(curves, axis=0)
                axes.plot(100 * np.array(SHARES), means, label=f"{arm} ({len(curves)})", linewidth=1.3)
        axes.set(
            xlabel="share of the samples, lowest entropy first, %",
            ylabel="neighbours of the same class, %",
            title="Consistency against the selected share (seeds)",
        )
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")
        return figure


def _bits(text: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).astype(bool)


def interval(values: Sequence[float]) -> tuple[str, str]:
    """Mean and Student's 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f}", "one seed"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, or 2 for unusable input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study_results", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data-root", type=Path, required=True, help="folder of train/<class>/ and test/<class>/")
    parser.add_argument("--sess-dir", type=Path, required=True, help="folder of the study's sessions")
    parser.add_argument("--results", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds (default: 0 1 2)")
    given = parser.parse_args(argv)
    try:
        collect(given.data_root, given.sess_dir, plan(given.seeds), given.results)
    except (UsageError, datasets.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = Results(given.results)
    text = results.tables()
    (given.results / "tables.md").write_text(text + "\n", encoding="utf-8")
    plots: Mapping[str, Figure] = {"knn": results.knn_plot(), "consistency": results.consistency_plot()}
    for name, figure in plots.items():
        figure.savefig(given.results / f"{name}.png", dpi=110)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
