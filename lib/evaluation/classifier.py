"""Accuracy of the test images by weighted kNN or the nearest neighbour.

Letters: N training samples, M test images, m test images of this rank, D embedding size, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lib.data.loader import Loader
from lib.distributed.processes import Ranks
from lib.distributed.sharded import ShardedRows
from lib.evaluation import features, knn
from lib.session.console import logger


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the test images, in [0, 1].

    ``top5`` is None for the nearest neighbour, which predicts a single class.
    """

    top1: float
    top5: float | None

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%}" + ("" if self.top5 is None else f" top-5 {self.top5:.2%}")


class Evaluator:
    """Classifies the test images by their similarity to the features of the training samples.

    Args:
        protocol: 'knn' or 'nn'.
        test: loader of the test images, in order.
        test_labels: (M,) class indices.
        train_labels: (N,) class indices.
        classes: C.
        k: K, number of neighbours that vote, reduced to N if it is larger.
        sigma: temperature of the vote weights exp(s / sigma).
        device: device of the network.
        ranks: the ranks of the run, each of which classifies its shard of the test images; None: a single process.
        labelled: loader of the images of ``train_labels``, in order, if these are not the training samples; their
            features are computed for each evaluation.
    """

    def __init__(
        self,
        protocol: str,
        *,
        test: Loader,
        test_labels: np.ndarray,
        train_labels: np.ndarray,
        classes: int,
        k: int,
        sigma: float,
        device: torch.device,
        ranks: Ranks | None = None,
        labelled: Loader | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._labelled = labelled
        self.against = "the labelled training images" if labelled else "the memory bank"
        self._test = test
        self.device = device
        self._test_labels = torch.from_numpy(test_labels[self._ranks.shard(len(test_labels))]).to(device)
        self._train_labels = torch.from_numpy(train_labels).to(device)
        voters = min(k, len(train_labels))
        if protocol == "nn":
            self.name = "NN"
            self._scores: Callable[..., torch.Tensor] = knn.nearest_neighbour
            self._constants: dict[str, float] = {"classes": classes}
        else:
            self.name = f"weighted kNN (K={voters}, sigma={sigma:g})"
            self._scores = knn.weighted_knn
            self._constants = {"classes": classes, "k": voters, "sigma": sigma}
            if voters < k:
                logger().info("kNN: K = %d is reduced to the number of training samples, %d", k, voters)
            if classes < 5:
                logger().info("kNN: with %d classes the top-5 accuracy is 100 %% by construction", classes)

    def __call__(self, network: torch.nn.Module, train_features: torch.Tensor | ShardedRows) -> Accuracy:
        """Extracts the features of the test images and classifies them.

        Args:
            network: maps images to embeddings; it runs in evaluation mode.
            train_features: (N, D), the memory bank or features computed with the test transform; ignored if the
                evaluator has images of its own.

        Returns:
            The accuracy over all test images, the same on every rank.
        """
        if self._labelled:
            found = features.extract(network, self._labelled, "features of the labelled images")
            train_features = ShardedRows(found, self._labelled.samples, self._ranks)
        return self.classify(features.extract(network, self._test, "test features"), train_features)

    def classify(self, queries: torch.Tensor, train_features: torch.Tensor | ShardedRows) -> Accuracy:
        """Accuracy from features of this rank's test images (m, D) and of the training samples (N, D)."""
        scores = self._scores(queries, train_features, self._train_labels, **self._constants)
        top1, top5 = (knn.top_k_accuracy(scores, self._test_labels, k, self._ranks) for k in (1, 5))
        return Accuracy(top1, None if self._scores is knn.nearest_neighbour else top5)
