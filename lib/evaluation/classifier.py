"""How embeddings are judged: weighted kNN and nearest neighbour.

Letters: N training samples, M test images, m of this process, D embedding, C classes.
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
    """Shares of right answers among the test images.

    ``top5`` counts the five best classes; None for the nearest neighbour, which names one class alone.
    """

    top1: float
    top5: float | None

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%}" + ("" if self.top5 is None else f" top-5 {self.top5:.2%}")


class Evaluator:
    """Classifies the test images by their similarity to the training samples' features.

    Args:
        protocol: 'knn' or 'nn'.
        test: the test images in order.
        test_labels: their classes.
        train_labels: (N,) classes of the training samples.
        classes: C.
        k: voters of the weighted kNN, cut to N.
        sigma: width of their weights.
        device: where the network is.
        world: the processes; each classifies its part of the test images.
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
    ) -> None:
        self._ranks = ranks or Ranks()
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
                logger().info("kNN: K = %d is cut to the %d training samples there are", k, voters)
            if classes < 5:
                logger().info("kNN: top-5 counts all of the %d classes, so it is 100 %% by construction", classes)

    def __call__(self, network: torch.nn.Module, train_features: torch.Tensor | ShardedRows) -> Accuracy:
        """Accuracy of the test images, the same in every process.

        Args:
            network: images to embeddings; run in inference mode.
            train_features: (N, D) memory bank, or features recomputed with the test transform.
        """
        return self.classify(features.extract(network, self._test, "test features"), train_features)

    def classify(self, queries: torch.Tensor, train_features: torch.Tensor | ShardedRows) -> Accuracy:
        """Accuracy of the test images by the features (m, D) of this process's, against the training images' (N, D)."""
        scores = self._scores(queries, train_features, self._train_labels, **self._constants)
        top1, top5 = (knn.top_k_accuracy(scores, self._test_labels, k, self._ranks) for k in (1, 5))
        return Accuracy(top1, None if self._scores is knn.nearest_neighbour else top5)
