"""Reads the data of a report from the folder of a session.

Letters: N training samples, D embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets import ImageSet
from lib.config.options import Options
from lib.config.parser import extra
from lib.errors import UsageError
from lib.evaluation.findings import Findings, blank_and_noisy, find
from lib.method.collapse import find_collapse
from lib.reporting.report_data import SEARCHED, SEED, Discovered, ReportData, Tested, drawn
from lib.session import metrics
from lib.training import checkpoint
from lib.training.checkpoint import Checkpoint


def collect(
    folder: Path,
    options: Options,
    loaded: Checkpoint,
    *,
    train: ImageSet,
    protocol: str,
    features: np.ndarray,
    statistics: np.ndarray,
    tested: Tested | None,
) -> ReportData:
    """The data of a session's report, with the loaded network.

    Args:
        loaded: its latest checkpoint.
        protocol: how the accuracies of the training were measured.
        features: (N, D) embeddings of the training images, computed with the test transform.
        statistics: (N, 2) contrast and smoothness of the training images.
        tested: the test images, or None without labels.

    Raises:
        UsageError: the session has no metrics, or a checkpoint cannot be used.
    """
    rows, starts = metrics.read(folder), metrics.starts(folder)
    last = rows[-1]
    shown: dict[str, Any] = options.model_dump(mode="json")
    try:
        memory: torch.Tensor = loaded["npc"]["memory"]
        if len(memory) != len(train):
            raise UsageError(f"{folder}: was trained on {len(memory)} samples, not {len(train)}; choose its data")
    except (KeyError, TypeError):
        raise UsageError(
            f"{folder}: its latest checkpoint has no memory bank, which a report needs; choose another session"
        ) from None
    blank, noisy = blank_and_noisy(statistics)
    searched = drawn(len(features), SEARCHED)
    return ReportData(
        name=folder.resolve().name,
        facts={str(name): str(value) for name, value in (starts[-1] if starts else {}).items()},
        options={name: value for name, value in shown.items() if not extra(name)["this_run"]},
        metrics=rows,
        warning=find_collapse(
            rows,
            samples=len(train),
            size=options.ANs_size,
            low_dim=options.low_dim,
            temperature=options.npc_temperature,
        ),
        protocol=protocol,
        published=options.published or "",
        rounds=[
            Discovered(round, *(part.cpu().numpy() for part in (found.entropy, found.anchors, found.neighbours)))
            for round, found in checkpoint.discoveries(folder, loaded, len(train))
        ],
        images=train.images,
        labels=train.labels,
        classes=train.classes,
        names=train.names,
        indices=train.indices,
        features=features,
        findings=_findings(features[searched], None if train.labels is None else train.labels[searched], options),
        searched=searched,
        blank=blank,
        noisy=noisy,
        tested=tested,
        chooser="held-out training images" if options.val_fraction else "the test labels",
        finished=(last["round"], last["epoch"]) >= (options.max_round - 1, options.max_epoch - 1),
    )


def _findings(features: np.ndarray, labels: np.ndarray | None, options: Options) -> Findings | str:
    """The findings of the searched images (F, D), or a sentence with the reason if there are none."""
    try:
        return find(
            features,
            labels,
            neighbours=options.graph_neighbours,
            resolution=options.graph_resolution,
            seed=SEED,
        )
    except UsageError as error:
        return f"Not known: {error}."
