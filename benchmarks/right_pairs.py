"""Trains as ``main.py`` does, but keeps only the anchors whose neighbours all have the anchor's label.

    python -m benchmarks.right_pairs --cfgs configs/base.yaml configs/cifar10-cpu.yaml

It tests one question of the study: do wrong pairs keep the curriculum from helping? The labels select the pairs that
are trained on, so its accuracy is not a result of unsupervised learning. The options are those of ``main.py``.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import main
from lib.errors import UsageError
from lib.method.neighbourhoods import Neighbourhoods
from lib.session.console import logger
from lib.training.trainer import Trainer


def keep_right_pairs(trainer: Trainer) -> None:
    """Turns anchors that have a neighbour with another label into instance samples.

    Raises:
        UsageError: the training images have no labels.
    """
    if trainer.labels is None:
        raise UsageError("benchmarks.right_pairs: the training images have no labels; put each class into a folder")
    found = trainer.state.neighbourhoods
    is_right = (trainer.labels[found.anchors][:, None] == trainer.labels[found.neighbours]).all(dim=1)  # (A,)
    kept = Neighbourhoods.of_anchors(found.anchors[is_right], found.neighbours[is_right], found.entropy)
    trainer.state.neighbourhoods = replace(kept, consistency=found.consistency)
    logger().info("%d of %d anchors have no wrong neighbour and are kept", kept.num_anchors, found.num_anchors)


def discover_right_pairs(self: Trainer) -> None:
    """``Trainer.discover``, then ``keep_right_pairs``."""
    discover(self)
    if self.state.round > 0:
        keep_right_pairs(self)


discover = Trainer.discover
if __name__ == "__main__":
    Trainer.discover = discover_right_pairs  # type: ignore[method-assign]
    sys.exit(main.main())
