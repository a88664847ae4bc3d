"""The encoder for ``torch.hub``: embeddings, use in other programs, and refused input."""

from __future__ import annotations

import copy
import io
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import main
import runs
import synthetic
from lib.config.options import Options
from lib.data import augmentation

ROOT = Path(__file__).parents[2]
LOW_DIM = 8
WORDS = f"""--dataset folder --network resnet10-w16 --resize 40 --size 32 --low-dim {LOW_DIM} --batch-size 32
--workers-num 0 --max-round 1 --max-epoch 1 --base-lr 0.01 --seed 3 --brief --log-tfb false""".split()
SMALL: dict[str, Any] = {"network": "resnet10-w16", "low_dim": LOW_DIM, "resize": 12, "size": 8}
CLOSE = 1e-6
"""Absolute tolerance of embeddings computed in different batches."""


def load(*arguments: Any, **named: Any) -> Any:
    return torch.hub.load(str(ROOT), "and_encoder", *arguments, source="local", **named)


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a session, the network that it exported, and the embeddings."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*WORDS, "--data-root", str(photos), "--sess-dir", str(folder), "--session", "mine"]
    exports = ["--export-features", str(folder / "out.npz"), "--export-model", str(folder / "model.safetensors")]
    assert main.main([*words, *exports]) == 0
    return folder


@pytest.fixture
def encoder() -> Any:
    return load(**SMALL)


def exported(path: Path) -> tuple[list[str], np.ndarray]:
    with np.load(path, allow_pickle=False) as content:
        return content["test_names"].tolist(), content["test_embeddings"]


@pytest.mark.parametrize("weights", ["model.safetensors", "mine", "mine/checkpoint/latest.ckpt"])
def test_embeddings_equal_the_exported_ones(weights: str, trained: Path, photos: Path) -> None:
    names, expected = exported(trained / "out.npz")
    encoder = load(weights=str(trained / weights))
    for batch_size in (3, 64):
        found = encoder.embed([photos / name for name in names], batch_size=batch_size)
        assert found.shape == (20, LOW_DIM) and found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=CLOSE)


def test_images_of_one_size_differ_by_rounding_only(trained: Path, tmp_path: Path) -> None:
    """The program keeps images of one size on the device and resizes them without rounding to 8 bits."""
    for number in range(40):
        path = tmp_path / "data" / ("train" if number < 32 else "test") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic.picture(number)).resize((50, 44)).save(path)
    model, out = trained / "model.safetensors", tmp_path / "out.npz"
    words = ["--cfgs", str(model.with_suffix(".yaml")), "--resume", str(model), "--test-only", "--debug"]
    for size, least in (([], 0.9999), (["--resize", "44", "50", "--size", "32"], 1 - CLOSE)):  # without resizing: exact
        more = ["--dataset", "folder", "--data-root", str(tmp_path / "data"), "--export-features", str(out), *size]
        assert main.main([*words, *more]) == 0
        names, expected = exported(out)
        out.unlink()
        encoder = load(weights=model, **({"resize": (44, 50)} if size else {}))
        found = encoder.embed([tmp_path / "data" / name for name in names])
        assert (found * torch.from_numpy(expected)).sum(dim=1).min() > least


@pytest.mark.parametrize("kind", ["path", "str", "PIL", "opened", "array"])
def test_files_pil_images_and_arrays_give_equal_embeddings(kind: str, encoder: Any, photos: Path) -> None:
    paths = sorted((photos / "test").rglob("*.png"))[:5]
    given: dict[str, Any] = {
        "path": paths,
        "str": [str(path) for path in paths],
        "PIL": [Image.fromarray(np.asarray(Image.open(path).convert("RGB"))) for path in paths],
        "opened": (Image.open(path) for path in paths),
        "array": [np.asarray(Image.open(path).convert("RGB")) for path in paths],
    }
    by_hand = torch.stack([encoder.transform(Image.open(path)) for path in paths])
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(given[kind]), encoder(by_hand), rtol=0, atol=CLOSE)


def test_exif_orientation_and_greyscale_images_are_handled(encoder: Any, tmp_path: Path) -> None:
    grey, rgb = synthetic.picture(1)[:, :, 0], synthetic.picture(2)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    upright = np.ascontiguousarray(np.rot90(rgb, -1))
    with Image.open(tmp_path / "turned.png") as opened:
        found = encoder.embed([tmp_path / "turned.png", opened, upright, grey, np.stack([grey] * 3, axis=2)])
    torch.testing.assert_close(found[:2], found[2].expand(2, -1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(found[3], found[4], rtol=0, atol=CLOSE)


@pytest.mark.parametrize(("resize", "size"), [(40, 32), (32, 32), ((40, 50), (32, 48)), (33, (20, 33))])
def test_transform_equals_that_of_test_runs(resize: Any, size: Any) -> None:
    means, stds = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    encoder = load(**{**SMALL, "resize": resize, "size": size, "means": means, "stds": stds})
    options, none = Options(resize=resize, size=size), np.zeros((1, augmentation.NUM_RANDOM))
    theirs = augmentation.for_testing(options, means, stds)
    for number in range(12):
        image = synthetic.picture(number)
        cropped = torch.from_numpy(theirs.crop_on_worker(image, none[0]).copy())[None]
        assert torch.equal(encoder.transform(Image.fromarray(image))[None], theirs.augment_on_device(cropped, none))


def test_modes_are_restored_and_no_gradient_is_kept(encoder: Any) -> None:
    assert not encoder.training
    encoder.train()
    encoder.network.layer1.eval() if hasattr(encoder.network, "layer1") else next(encoder.network.children()).eval()
    modes = [module.training for module in encoder.modules()]
    assert True in modes and False in modes
    state = copy.deepcopy(encoder.state_dict())
    found = encoder.embed([synthetic.picture(number) for number in range(3)])
    assert [module.training for module in encoder.modules()] == modes and not found.requires_grad
    with pytest.raises(ValueError):
        encoder.embed([synthetic.picture(1), "nowhere.jpg"], batch_size=1)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def test_encoder_is_an_ordinary_module(encoder: Any) -> None:
    images = [synthetic.picture(number) for number in range(3)]
    expected, file = encoder.embed(images), io.BytesIO()
    torch.save(encoder.state_dict(), file)
    other = load(**SMALL)
    assert not torch.equal(other.embed(images), expected)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for same in (other, copy.deepcopy(encoder), encoder.to("cpu")):
        assert torch.equal(same.embed(images), expected)
    doubled = copy.deepcopy(encoder).double()
    torch.testing.assert_close(doubled.embed(images), expected, rtol=0, atol=1e-5)
    transform = pickle.loads(pickle.dumps(encoder.transform))  # workers of a DataLoader pickle it
    picture = Image.fromarray(images[0])
    assert torch.equal(transform(picture), encoder.transform(picture))
    maps = encoder.stages(encoder.transform(picture)[None])
    assert list(maps) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc"] and maps["fc"].shape == (1, LOW_DIM)


def test_empty_input_gives_no_rows(encoder: Any) -> None:
    assert encoder.embed([]).shape == (0, LOW_DIM)


PROGRAM = """
import copy, importlib, sys, torch

def load(**values):
    return torch.hub.load(sys.argv[1], "and_encoder", source="local", **values)

path, modules = list(sys.path), set(sys.modules)
encoder = load(weights=sys.argv[2])
assert sys.path == path
names = {name.partition(".")[0] for name in set(sys.modules) - modules}
assert not names & {"datasets", "lib", "models", "main", "hubconf"}, names
import datasets, lib, models
images = [f"{sys.argv[3]}/test/{number % 3}/{number}.png" for number in range(4)]
rows = encoder.embed(images)
again = load(weights=sys.argv[2])  # after the program imported its own packages
assert type(again) is type(encoder) and torch.equal(again.embed(images), rows) and rows.shape == (4, 8)
assert torch.equal(copy.deepcopy(encoder).embed(images), rows)
assert load(network="alexnet-small", size=32).stages(torch.zeros(1, 3, 32, 32))["fc"].shape == (1, 128)
for name in ("datasets", "lib", "models"):
    assert importlib.import_module(name) is globals()[name] and globals()[name].WHOSE == "yours"
    assert importlib.import_module(f"{name}.inner").WHOSE == "yours"
assert sys.path == path
print("done")
"""


def test_other_packages_of_the_same_names_still_work(trained: Path, photos: Path, tmp_path: Path) -> None:
    """The program imports its own packages before and after it loads the encoder."""
    for name in ("datasets", "lib", "models"):
        (tmp_path / name).mkdir()
        for module in ("__init__", "inner"):
            (tmp_path / name / f"{module}.py").write_text("WHOSE = 'yours'\n", encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    words = [str(ROOT), str(trained / "model.safetensors"), str(photos)]
    process = runs.start(*words, program=("program.py",), cwd=tmp_path)
    shown = runs.output_of(process)
    assert process.returncode == 0 and shown.splitlines()[-1] == "done", shown


def test_loading_keeps_the_modules_of_the_program() -> None:
    path, own = list(sys.path), {name: sys.modules[name] for name in ("datasets", "lib", "models", "lib.errors")}
    load(**SMALL)
    assert sys.path == path and all(sys.modules[name] is module for name, module in own.items())


def test_documented_examples_run_in_an_empty_folder(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.safetensors", "model.yaml"):
        shutil.copy(trained / name, tmp_path / name)
    for number in range(8):
        path = tmp_path / "photos" / f"{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic.picture(number)).save(path)
    for name in ("holiday.jpg", "a.jpg", "b.jpg"):
        shutil.copy(tmp_path / "photos" / "1" / "3.jpg", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for page in ("README.md", "docs/using.md"):
        blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
        scope: dict[str, Any] = {}
        exec("".join(blocks).replace("path/to/repository", str(ROOT)), scope)
        assert scope["embeddings"].shape[1] == LOW_DIM
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0] == "1.000 photos/1/3.jpg"


# what is refused


def refused(*arguments: Any, **named: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unusable_weights_are_refused_in_one_sentence(trained: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.yaml"):
        shutil.copy(trained / name, tmp_path / name)
    assert "nowhere.safetensors: no such file or folder" in refused(tmp_path / "nowhere.safetensors")
    assert re.search("is not a session folder: there is no config.yaml in it$", refused(tmp_path))
    options = tmp_path / "model.yaml"
    text = options.read_text(encoding="utf-8")
    options.write_text(text.replace("resnet10-w16", "resnet10-w32"), encoding="utf-8")
    assert "only" in refused(tmp_path / "model.safetensors") and "tensors match" in refused(
        tmp_path / "model.safetensors"
    )
    options.write_text(text.replace("low_dim: 8", "low_dim: 9"), encoding="utf-8")
    assert "has no weights for 2 tensors of the network" in refused(tmp_path / "model.safetensors")
    options.write_text(text, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:5000])
    assert "is damaged" in refused(tmp_path / "model.safetensors")
    options.unlink()
    assert "there is no model.yaml next to it" in refused(tmp_path / "model.safetensors")
    assert "set --low-dim to it" in refused(trained / "mine", low_dim=9)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"network": "resnet11"}, "--network resnet11: unknown name; did you mean resnet101?"),
        ({"low_dim": 0}, "and_encoder: low_dim: "),
        ({"size": 300}, "resize: 256 is smaller than size: 300"),
        ({"network": "alexnet", "size": 8}, "does not accept images of 8 x 8 pixels"),
    ],
)
def test_unusable_values_are_refused_in_one_sentence(values: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(**values)


def test_unusable_images_are_named(encoder: Any, tmp_path: Path) -> None:
    good, bad = synthetic.picture(1), tmp_path / "bad.png"
    Image.fromarray(good).save(bad)
    bad.write_bytes(bad.read_bytes()[:200])
    for image, sentence in (
        (bad, f"image 1: {bad}: cannot be read as an image: "),
        (str(bad), f"image 1: {bad}: cannot be read as an image: "),
        (tmp_path / "nowhere.png", f"image 1: {tmp_path}/nowhere.png: no such file"),
        (
            Image.fromarray(np.zeros((4, 4), np.float32)),
            "image 1: the image: cannot be read as an image: floating-point",
        ),
        (good.astype(np.float32), "image 1: is an array of float32 with shape"),
        (good[None], "image 1: is an array of uint8 with shape (1, "),
        (np.zeros((0, 4, 3), np.uint8), "image 1: is an array of uint8 with shape (0, 4, 3)"),
        (None, "image 1: is a NoneType; give a path, a PIL image or a uint8 array"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            encoder.embed([good, image])
    with Image.open(bad) as opened, pytest.raises(ValueError, match=f"^image 0: {re.escape(str(bad))}: cannot be read"):
        encoder.embed([opened])
    for one in (str(bad), bad, Image.fromarray(good)):
        with pytest.raises(ValueError, match=r"^embed takes a list of images, not one "):
            encoder.embed(one)
    with pytest.raises(ValueError, match=r"^batch_size must be 1 or more, got 0$"):
        encoder.embed([good], batch_size=0)
