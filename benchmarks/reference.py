"""Plain implementations, for comparison: the obvious ones, and those of the reference.

Letters: B batch, N samples, Q queries, D embedding, K nearest, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEANS, STDS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def augmentation(size: int) -> Callable[[np.ndarray], torch.Tensor]:
    """The paper's augmentation of one image (H, W, 3), by torchvision on Pillow images."""
    composed: Callable[[np.ndarray], torch.Tensor] = transforms.Compose(
        [
            Image.fromarray,
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
            transforms.ColorJitter(0.4, 0.4, 0.4, 0.4),
            transforms.RandomGrayscale(0.2),
            transforms.ToTensor(),
            transforms.Normalize(MEANS, STDS),
        ]
    )
    return composed


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Images (N, H, W, 3), augmented one at a time."""

    def __init__(self, images: np.ndarray, size: int) -> None:
        self.images, self.transform = images, augmentation(size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), index


def loader(images: np.ndarray, size: int, batch: int, workers: int) -> DataLoader[tuple[torch.Tensor, int]]:
    """Shuffled batches from worker processes."""
    return DataLoader(
        Augmented(images, size),
        batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )


def instance_loss(embeddings: torch.Tensor, memory: torch.Tensor, index: torch.Tensor, tau: float) -> torch.Tensor:
    """The loss by a softmax over the full rows (B, N)."""
    probabilities = (embeddings @ memory.t() / tau).softmax(dim=1)
    return -probabilities.gather(1, index[:, None]).log().mean()


def discovery(
    memory: torch.Tensor, tau: float, anchors: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropies by softmax in chunks of 1,000 rows, positions by a loop, neighbours by top-k in chunks of 1,000.

    Returns:
        Entropies (N,), positions (N,) and the anchors' neighbours (A, K).
    """
    entropy = torch.cat([_entropy(part @ memory.t() / tau) for part in memory.split(1000)])
    order = entropy.argsort()
    chosen, others = order[:anchors], order[anchors:]
    position = torch.zeros(len(memory), dtype=torch.long)
    for place, sample in enumerate(chosen.tolist()):
        position[sample] = place
    for place, sample in enumerate(others.tolist()):
        position[sample] = -place - 1
    near = torch.cat([(part @ memory.t()).topk(size + 1, dim=1).indices[:, 1:] for part in memory[chosen].split(1000)])
    return entropy, position, near


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    probabilities = logits.softmax(dim=1)
    return -(probabilities * (probabilities + 1e-30).log()).sum(dim=1)


def weighted_knn(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, *, classes: int, k: int, sigma: float
) -> torch.Tensor:
    """Classes (Q, C), best first: in batches of 100, one-hot votes of the K nearest, sorted."""
    ranked = []
    for part in queries.split(100):
        near, index = (part @ bank.t()).topk(k, dim=1, largest=True, sorted=True)  # (100, K)
        votes = torch.zeros(len(part) * k, classes, device=bank.device)
        votes.scatter_(1, labels[index].view(-1, 1), 1)
        weights = (near / sigma).exp()
        scores = (votes.view(len(part), k, classes) * weights[:, :, None]).sum(dim=1)  # (100, C)
        ranked.append(scores.sort(dim=1, descending=True).indices)
    return torch.cat(ranked)
