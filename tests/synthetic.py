"""Small synthetic data sets with the folders, lists and file formats of the published ones.

The colour of every picture encodes its number: ``number_of`` decodes it from any part of the picture.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.io
import torchvision.datasets as published
from PIL import Image

from lib.data.augmentation import Augmentation, Colour

Box = tuple[float, float, float, float]
DEVKIT = "ILSVRC2012_devkit_t12"
WNIDS = ("n02119789", "n02100735", "n02110185", "n02096294", "n02102040")  # classes 1 to 5 of ILSVRC2012, unsorted
SPECIES = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross", "004.Groove_billed_Ani")
BREEDS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog", "n02116738-African_hunting_dog")


def untouched(*size: int, means: Colour = (0, 0, 0), stds: Colour = (1, 1, 1)) -> Augmentation:
    """An augmentation that leaves images of a size (h, w) unchanged, with values from 0 to 1."""
    return Augmentation(resize=(size[0], size[1]), size=(size[0], size[1]), means=means, stds=stds, centred=True)


def picture(number: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) of uint8: noise around the number's colour; ``size`` is (W, H), by default one of many."""
    width, height = size or (40 + 7 * number % 41, 40 + 11 * number % 41)
    noise = np.random.default_rng(number).integers(-20, 21, (height, width, 3))
    return (_colour(number) + noise).astype(np.uint8)


def number_of(image: np.ndarray) -> int:
    """The number of a picture (h, w, 3), or of a part of it."""
    levels = np.rint((image.reshape(-1, 3).mean(axis=0) - 40) / 60).astype(int)
    return int(levels @ (1, 4, 16))


def save(path: Path, number: int, size: tuple[int, int] | None = None) -> None:
    """Writes a picture in the format of the file's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lossy = {"quality": 95, "subsampling": 0} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    Image.fromarray(picture(number, size)).save(path, **lossy)


def age(root: Path, seconds: float = 60) -> None:
    """Sets the modification time of every folder to ``seconds`` ago."""
    then = time.time() - seconds
    for folder, _, _ in os.walk(root):
        os.utime(folder, (then, then))


def cifar(root: Path, *, classes: int = 10, images: int = 20) -> None:
    """CIFAR-10 or CIFAR-100: ``images`` for training, a multiple of five, and half as many for testing.

    Training image i is picture i % 64; test images continue the count. The label is i % classes.
    """
    fine = classes == 100
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True, exist_ok=True)
    size, key = images // 5, b"fine_labels" if fine else b"labels"
    batches = {"train": (0, images)} if fine else {f"data_batch_{n + 1}": (n * size, size) for n in range(5)}
    for name, (first, count) in {**batches, "test" if fine else "test_batch": (images, images // 2)}.items():
        numbers = range(first, first + count)
        pixels = np.stack([picture(n % 64, (32, 32)) for n in numbers])  # (n, 32, 32, 3)
        content: dict[bytes, Any] = {
            b"batch_label": b"a batch",
            b"data": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(count, 3072),
            b"filenames": [b"picture_s_%06d.png" % n for n in numbers],
            key: [n % classes for n in numbers],
        }
        if fine:
            content[b"coarse_labels"] = [n % 20 for n in numbers]
        (folder / name).write_bytes(_python2_pickle(content))
    if fine:
        meta: dict[bytes, Any] = {b"fine_label_names": [b"fine%d" % n for n in range(100)]}
        meta[b"coarse_label_names"] = [b"coarse%d" % n for n in range(20)]
    else:
        labels = b"airplane automobile bird cat deer dog frog horse ship truck".split()
        meta = {b"num_cases_per_batch": size, b"label_names": labels, b"num_vis": 3072}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(_python2_pickle(meta))


def svhn(root: Path, *, images: int = 20) -> None:
    """SVHN, cropped: ``images`` for training and half as many for testing.

    Training image i is picture i % 64 of the digit i % 10; test images continue the count. 0 is stored as 10.
    """
    root.mkdir(parents=True, exist_ok=True)
    for name, first, count in (("train_32x32.mat", 0, images), ("test_32x32.mat", images, images // 2)):
        numbers = range(first, first + count)
        pixels = np.stack([picture(n % 64, (32, 32)) for n in numbers], axis=3)  # (32, 32, 3, n)
        digits = np.array([[n % 10 or 10] for n in numbers], np.uint8)  # (n, 1)
        scipy.io.savemat(root / name, {"X": pixels, "y": digits}, do_compression=True)


def stl10(root: Path, *, images: int = 20, unlabelled: int = 30) -> None:
    """STL-10: ``images`` labelled training images, ``unlabelled`` others, and half of ``images`` for testing.

    Labelled image i is picture i % 64 with the label i % 10. The unlabelled and then the test images continue the
    count.
    """
    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for name, count in (("train", images), ("unlabeled", unlabelled), ("test", images // 2)):
        numbers = range(first, first := first + count)
        pixels = np.stack([picture(n % 64, (96, 96)) for n in numbers])  # (n, H, W, 3)
        pixels.transpose(0, 3, 2, 1).tofile(folder / f"{name}_X.bin")  # column by column
        if name != "unlabeled":
            np.array([n % 10 + 1 for n in numbers], np.uint8).tofile(folder / f"{name}_y.bin")
    names = "airplane bird car cat deer dog horse monkey ship truck".split()
    (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in names))


def accept(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Makes torchvision expect the MD5 sums of the files below a root."""

    def digest(*parts: str) -> str:
        path = Path(root, *parts)
        return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "0" * 32

    for source in (published.CIFAR10, published.CIFAR100):
        for part in ("train_list", "test_list"):
            files = [[name, digest(source.base_folder, name)] for name, _ in getattr(source, part)]
            monkeypatch.setattr(source, part, files)
        meta = {**source.meta, "md5": digest(source.base_folder, source.meta["filename"])}
        monkeypatch.setattr(source, "meta", meta)
    for part in ("train_list", "test_list"):
        files = [[name, digest(published.STL10.base_folder, name)] for name, _ in getattr(published.STL10, part)]
        monkeypatch.setattr(published.STL10, part, files)
    parts = {part: [url, name, digest(name)] for part, (url, name, _) in published.SVHN.split_list.items()}
    monkeypatch.setattr(published.SVHN, "split_list", parts)


def imagenet(root: Path, *, classes: int = 3, per_class: int = 4, val: int = 2, flat: bool = False) -> dict[str, int]:
    """ILSVRC2012 with ``per_class`` training and ``val`` validation images per class; ``flat``: with the devkit.

    Returns:
        the number of each picture by file name; number % classes is its class's place in ``WNIDS``.
    """
    numbers: dict[str, int] = {}
    for number in range(classes * per_class):
        wnid = WNIDS[number % classes]
        numbers[f"train/{wnid}/{wnid}_{number * 37 + 1}.JPEG"] = number
    draw = np.random.default_rng(classes)
    order = draw.permutation(classes * val) + classes * per_class  # the published order is random
    for place, number in enumerate(order.tolist(), start=1):
        folder = "val" if flat else f"val/{WNIDS[number % classes]}"
        numbers[f"{folder}/ILSVRC2012_val_{place:08d}.JPEG"] = number
    for name, number in numbers.items():
        save(root / name, number)
    if flat:
        devkit(root, [number % classes + 1 for number in order.tolist()])
    return numbers


def devkit(root: Path, truth: Sequence[int]) -> None:
    """The devkit's folder: classes of ``WNIDS`` numbered from 1, inner nodes, and the validation labels."""
    data = root / DEVKIT / "data"
    data.mkdir(parents=True, exist_ok=True)
    leaves = len(WNIDS)
    inner = [("n02083346", "canine, canid", (1, 2, 3)), ("n00001740", "entity", tuple(range(4, leaves + 2)))]
    rows = [(wnid, f"class {i}, number {i}", ()) for i, wnid in enumerate(WNIDS, start=1)]
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    fields += ["wordnet_height", "num_train_images"]
    synsets = np.empty((leaves + len(inner), 1), [(field, object) for field in fields])
    for i, (wnid, words, children) in enumerate([*rows, *inner]):
        numbers = np.array([children], np.float64).reshape(1, -1)
        height = 0 if i < leaves else i - leaves + 1
        synsets[i, 0] = (float(i + 1), wnid, words, "a gloss", float(len(children)), numbers, float(height), 1300.0)
    scipy.io.savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in truth))
    (root / DEVKIT / "readme.txt").write_text("Development kit of ILSVRC2012\n")


def pack_devkit(root: Path) -> Path:
    """Packs the devkit's folder as it is published, and removes it."""
    archive = root / f"{DEVKIT}.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(root / DEVKIT, DEVKIT)
    for path in sorted((root / DEVKIT).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (root / DEVKIT).rmdir()
    return archive


def cub200(root: Path, *, classes: int = 3, per_class: int = 4, boxes: Mapping[int, Box] | None = None) -> None:
    """CUB-200-2011: image i from 1 is picture i, of class (i - 1) // per_class + 1, for training if i is odd.

    Args:
        root: gets the folder CUB_200_2011.
        classes: of ``SPECIES``.
        per_class: images, of both splits together.
        boxes: left, top, width and height by image; otherwise one of 20 x 25.5 pixels.
    """
    home = root / "CUB_200_2011"
    lists: dict[str, list[str]] = {
        "classes": [f"{i} {name}" for i, name in enumerate(SPECIES[:classes], start=1)],
        "images": [],
        "image_class_labels": [],
        "train_test_split": [],
        "bounding_boxes": [],
    }
    for i in range(1, classes * per_class + 1):
        species = (i - 1) // per_class
        folder = SPECIES[species]
        name = f"{folder}/{folder.split('.')[1].title()}_{i:04d}_{18 + i}.jpg"
        save(home / "images" / name, i)
        box = (boxes or {}).get(i, (5.0 + i % 3, 7.0, 20.0, 25.5))
        lists["images"].append(f"{i} {name}")
        lists["image_class_labels"].append(f"{i} {species + 1}")
        lists["train_test_split"].append(f"{i} {i % 2}")
        lists["bounding_boxes"].append(f"{i} {' '.join(str(float(value)) for value in box)}")
    for name, lines in lists.items():
        (home / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    (home / "README").write_text("Caltech-UCSD Birds-200-2011\n")


def dogs(
    root: Path,
    *,
    classes: int = 3,
    per_class: int = 4,
    boxes: Mapping[int, Sequence[tuple[int, int, int, int]]] | None = None,
) -> None:
    """Stanford Dogs: image i from 1 is picture i, of breed (i - 1) // per_class + 1, for training if i is odd.

    Args:
        root: gets Images, Annotation and lists.
        classes: of ``BREEDS``.
        per_class: images, of both splits together.
        boxes: xmin, ymin, xmax and ymax of every dog by image, from 1; otherwise one of 20 x 25 pixels.
    """
    rows: dict[str, list[tuple[str, int]]] = {"train_list": [], "test_list": [], "file_list": []}
    for i in range(1, classes * per_class + 1):
        breed = (i - 1) // per_class
        folder = BREEDS[breed]
        name = f"{folder}/{folder.split('-')[0]}_{10073 + i}"
        save(root / "Images" / f"{name}.jpg", i)
        annotate(root, name, (boxes or {}).get(i, [(6 + i % 3, 8, 25 + i % 3, 32)]))
        rows["train_list" if i % 2 else "test_list"].append((name, breed + 1))
        rows["file_list"].append((name, breed + 1))
    for name, entries in rows.items():
        dogs_list(root / "lists" / f"{name}.mat", [f"{n}.jpg" for n, _ in entries], [label for _, label in entries])


def dogs_list(path: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """A list of Stanford Dogs: cell arrays (N, 1) of strings, and labels (N, 1)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, np.ndarray] = {}
    for key, entries in (("file_list", names), ("annotation_list", [name.rsplit(".", 1)[0] for name in names])):
        content[key] = np.empty((len(entries), 1), object)
        content[key][:, 0] = entries
    scipy.io.savemat(path, {**content, "labels": np.array(labels, np.float64).reshape(-1, 1)})


def annotate(root: Path, name: str, boxes: Sequence[tuple[int, int, int, int]]) -> None:
    """The annotation of an image of Stanford Dogs, named without extension: PASCAL VOC XML with a box per dog."""
    annotation = ElementTree.Element("annotation")
    _add(annotation, folder=name.split("-")[0][1:], filename=name.split("/")[1], source={"database": "ImageNet"})
    _add(annotation, size={"width": 80, "height": 80, "depth": 3}, segment=0)
    for left, top, right, bottom in boxes:
        corners = {"xmin": left, "ymin": top, "xmax": right, "ymax": bottom}
        dog = {"name": name.split("/")[0].split("-")[1], "pose": "Unspecified", "truncated": 0, "difficult": 0}
        _add(annotation, object={**dog, "bndbox": corners})
    ElementTree.indent(annotation, "\t")
    path = root / "Annotation" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ElementTree.tostring(annotation, encoding="unicode") + "\n")


def _add(parent: ElementTree.Element, **children: Any) -> None:
    for tag, value in children.items():
        child = ElementTree.SubElement(parent, tag)
        if isinstance(value, dict):
            _add(child, **value)
        else:
            child.text = str(value)


def _colour(number: int) -> np.ndarray:
    """(3,): one of 64 colours, far from black, white and each other."""
    assert 0 <= number < 64
    return 40 + 60 * np.array([number % 4, number // 4 % 4, number // 16])


class _Python2(pickle._Pickler):
    """Writes protocol 2 as cPickle of Python 2 did: text as byte strings, which Python 3 cannot write otherwise."""

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch}

    def string(self, value: str | bytes) -> None:
        text = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"U" + bytes([len(text)]) if len(text) < 256 else b"T" + len(text).to_bytes(4, "little"))
        self.write(text)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = string


def _python2_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    _Python2(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")  # NumPy 1 and before
