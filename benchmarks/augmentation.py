"""Augmenting images of 32x32 pixels, per core, against torchvision on Pillow images one by one."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import measure, reference
from lib.data.augmentation import NUM_RANDOM, Augmentation

BATCH, BATCHES = 128, 8
PAPER = Augmentation(
    (32, 32), (32, 32), reference.MEANS, reference.STDS, scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), grey=0.2
)


def run(repeats: int, device: torch.device) -> str:
    """A table of images/s; on a CPU both use one thread, as the plain implementation uses no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8)
    resident, one = torch.from_numpy(images).to(device), reference.augmentation(32)
    ways: dict[str, measure.Way] = {
        "torchvision, image by image": lambda: [
            torch.stack([one(image) for image in images]).to(device) for _ in range(BATCHES)
        ],
        "this project, a batch": lambda: [PAPER(resident, draw.random((BATCH, NUM_RANDOM))) for _ in range(BATCHES)],
    }
    seconds = measure.interleaved(ways, repeats, device)
    torch.set_num_threads(threads)
    plain, ours = seconds.values()
    rows = [(name, measure.spread([BATCH * BATCHES / s for s in values], ",.0f")) for name, values in seconds.items()]
    rows.append(("ratio", f"{measure.ratio(plain, ours):.1f} times"))
    return measure.table(["way", "images/s"], rows)
