"""A trained network for other programs, used by ``hubconf.py``: maps images to embeddings.

Letters: B batch size, N images, H x W pixels, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

import datasets
import models
from lib.config import parser
from lib.config.options import Options, height_and_width
from lib.config.resolve import check_names
from lib.errors import UsageError
from lib.evaluation import features
from lib.session.locate import folder_of
from lib.training import checkpoint, pretrained

Picture = Image.Image | np.ndarray | str | Path
USE = ("dataset", "network", "low_dim", "head", "embed", "resize", "size", "means", "stds")
"""The options of an encoder. If means or stds are not set, those of ``dataset`` are used."""


class Encoder(torch.nn.Module):
    """A network with its preprocessing.

    Attributes:
        network: the network, images (B, 3, H, W) -> unit-length embeddings (B, D), or features of ``--embed``.
        transform: the test transform of the network, a PIL image -> float32 (3, H, W), normalised.
        low_dim: D.
    """

    def __init__(self, network: torch.nn.Module, transform: Callable[[Image.Image], torch.Tensor], low_dim: int):
        super().__init__()
        self.network = network
        self.transform = transform
        self.low_dim = low_dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), as returned by ``transform``, -> unit-length embeddings (B, D)."""
        embeddings: torch.Tensor = self.network(images)
        return embeddings

    def stages(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images (B, 3, H, W) -> the feature maps of the stages by name, and the embeddings (B, D) as ``fc``."""
        maps: dict[str, torch.Tensor] = self.network.stages(images)  # type: ignore[operator]
        return maps

    @torch.no_grad()
    def embed(self, images: Iterable[Picture], *, batch_size: int = 64) -> torch.Tensor:
        """Reads, transforms and embeds images, in evaluation mode; each module's mode is restored afterwards.

        Args:
            images: paths of image files, PIL images, or uint8 arrays (H, W, 3) in RGB or (H, W) in grey, of any sizes.
                The EXIF orientation is applied. Each image is read when its batch is embedded.
            batch_size: number of images that are embedded at a time.

        Returns:
            (N, D) on the CPU, unit length.

        Raises:
            ValueError: an image cannot be read (the message says which), or ``batch_size`` is not positive.
        """
        if isinstance(images, str | Path | Image.Image):
            raise ValueError(f"embed takes a list of images, not one {type(images).__name__}: write embed([image])")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        like = next(self.network.parameters())
        modes = [(module, module.training) for module in self.modules()]
        found = [torch.empty(0, self.low_dim)]
        self.eval()
        try:
            transformed = (self.transform(_picture(number, image)) for number, image in enumerate(images))
            while batch := list(islice(transformed, batch_size)):
                found.append(self(torch.stack(batch).to(like)).float().cpu())
        finally:
            for module, mode in modes:
                module.training = mode
        return torch.cat(found)


def _picture(number: int, image: Any) -> Image.Image:
    """One image as an upright PIL image in RGB. Raises ValueError, with its number in the list."""
    try:
        if isinstance(image, str | Path):
            return Image.fromarray(datasets.read_picture(Path(image)))
        if isinstance(image, Image.Image):
            return Image.fromarray(datasets.rgb_of(image))
    except datasets.DataError as error:
        raise ValueError(f"image {number}: {error}") from None
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image {number}: is a {type(image).__name__}; give a path, a PIL image or a uint8 array")
    if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2 or not image.size:
        raise ValueError(
            f"image {number}: is an array of {image.dtype} with shape {image.shape}; give uint8 (H, W, 3) in RGB, or "
            "(H, W) in grey"
        )
    return Image.fromarray(image)


def test_transform(options: Options) -> transforms.Compose:
    """The test transform of ``lib/data/augmentation.py`` for one PIL image, from torchvision's; it can be pickled.

    It gives the same numbers as ``Augmentation.crop_on_worker`` and ``augment_on_device``.
    """
    source = datasets.DATASETS[options.dataset]
    return transforms.Compose(
        [
            v2.RGB(),
            transforms.Resize(options.resize),
            transforms.CenterCrop(height_and_width(options.size)),
            transforms.ToTensor(),
            transforms.Normalize(options.means or source.means, options.stds or source.stds),
        ]
    )


def load(weights: str | Path | None, given: dict[str, Any]) -> Encoder:
    """An encoder in evaluation mode, on the CPU.

    Args:
        weights: a network that was exported to a .safetensors file, with its .yaml next to it; a session folder, or a
            checkpoint in one; None: random weights.
        given: values of the options in ``USE``, which override those that belong to the weights.

    Raises:
        ValueError: the weights are missing, damaged or not those of the network, or a value is wrong.
    """
    with _as_value_errors():
        path = None if weights is None else Path(weights)
        options = _options_of(path, given)
        size = height_and_width(options.size)
        network = models.build(
            options.network, low_dim=options.low_dim, size=size, head=options.head, stage=options.embed
        )
        if path:
            _load_all(network, path)
        embedder = features.embedder(network.eval(), options.embed)
        with torch.no_grad():
            width = embedder(torch.zeros(1, 3, *size)).shape[1]
        return Encoder(embedder, test_transform(options), width).eval()


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """Turns the errors of this program into ValueError for other programs."""
    try:
        yield
    except (UsageError, datasets.DataError, models.NetworkError) as error:
        raise ValueError(str(error)) from None


def _options_of(weights: Path | None, given: dict[str, Any]) -> Options:
    """The options of a file or session folder, or the defaults, with the given values."""
    values: dict[str, Any] = {"dataset": "folder"}
    if weights:
        if not weights.exists():
            raise UsageError(
                f"{weights}: no such file or folder; weights should name an exported .safetensors file, a session "
                "folder or a checkpoint"
            )
        session = weights if weights.is_dir() else folder_of(weights)
        place = session / "config.yaml" if session else weights.with_suffix(".yaml")
        if not place.is_file():
            what = "is not a session folder" if session else "is not a network of this program, or its options are lost"
            raise UsageError(f"{weights}: {what}: there is no {place.name} {'in' if session else 'next to'} it")
        values = parser.read_options([], base=place).model_dump(include=set(USE))
    values |= given
    options = parser.validated(values, dict.fromkeys(values, "and_encoder:"))
    check_names(options)
    return options


def _load_all(network: torch.nn.Module, weights: Path) -> None:
    """Loads all weights of the network. Raises UsageError if one is missing."""
    path, loaded = checkpoint.load_resumed(weights)
    if "net" in loaded:
        checkpoint.load_network(network, loaded, path)
        return
    found = pretrained.load(network, loaded["weights"], path)
    if found.missing_keys:
        raise UsageError(
            f"{path}: has no weights for {len(found.missing_keys)} tensors of the network, first "
            f"{found.missing_keys[0]}; choose a file that --export-model wrote"
        )
