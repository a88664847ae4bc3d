"""Image files of every format become RGB arrays or are refused with a reason."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import runs
from datasets import images
from datasets.images import (
    DataError,
    ImageFiles,
    ImageSet,
    Splits,
    UnreadableImageError,
    check_whole,
    hold_out,
    read_picture,
    read_rgb,
    size_of,
)

RGB = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype(np.uint8)
GREY = RGB[..., 0]


def is_rgb(image: np.ndarray, height: int = 6, width: int = 10) -> bool:
    return image.dtype == np.uint8 and image.shape == (height, width, 3)


def grey_of(image: np.ndarray) -> np.ndarray:
    """The common value of three equal channels."""
    assert (image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all()
    return np.asarray(image[..., 0])


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "ppm"])
def test_rgb_files_give_their_pixels(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{ending}"
    Image.fromarray(RGB).save(path)
    assert is_rgb(read_rgb(path)) and (read_rgb(path) == RGB).all()
    assert size_of(path) == (10, 6)


def test_lossless_webp_gives_its_pixels(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "image.webp", lossless=True)
    assert (read_rgb(tmp_path / "image.webp") == RGB).all()


def test_jpeg_gives_approximately_its_pixels(tmp_path: Path) -> None:
    smooth = np.zeros((32, 32, 3), np.uint8)
    smooth[:, :, 0] = np.linspace(0, 255, 32)
    smooth[:, :, 1] = np.linspace(255, 0, 32)[:, None]
    Image.fromarray(smooth).save(tmp_path / "image.jpg", quality=98, subsampling=0)
    assert np.abs(read_rgb(tmp_path / "image.jpg").astype(int) - smooth).max() <= 8


@pytest.mark.parametrize("ending", ["png", "pgm", "bmp", "tiff"])
def test_greyscale_is_repeated_in_three_channels(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{ending}"
    Image.fromarray(GREY).save(path)
    assert is_rgb(read_rgb(path)) and (grey_of(read_rgb(path)) == GREY).all()


@pytest.mark.parametrize("ending", ["png", "tiff", "bmp"])
def test_black_and_white_becomes_0_and_255(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{ending}"
    Image.fromarray(GREY > 127).convert("1").save(path)
    with Image.open(path) as image:
        assert image.mode == "1"
    assert (grey_of(read_rgb(path)) == np.where(GREY > 127, 255, 0)).all()


COLOURS = [[255, 0, 0], [0, 128, 0], [0, 0, 255], [200, 100, 50]]


def palette_image() -> tuple[Image.Image, np.ndarray]:
    index = np.arange(60).reshape(6, 10) % 4
    image = Image.fromarray(index.astype(np.uint8)).convert("P")
    image = Image.frombytes("P", (10, 6), index.astype(np.uint8).tobytes())
    image.putpalette([value for colour in COLOURS for value in colour])
    return image, np.array(COLOURS, np.uint8)[index]


@pytest.mark.parametrize("ending", ["png", "tiff", "bmp"])
def test_palette_image_becomes_rgb(ending: str, tmp_path: Path) -> None:
    image, expected = palette_image()
    image.save(tmp_path / f"image.{ending}")
    assert (read_rgb(tmp_path / f"image.{ending}") == expected).all()


@pytest.mark.parametrize("transparency", [2, bytes([0, 128, 255, 3])], ids=["one colour", "every colour"])
def test_palette_with_transparency_becomes_rgb_without_a_warning(transparency: int | bytes, tmp_path: Path) -> None:
    image, expected = palette_image()
    image.save(tmp_path / "image.png", transparency=transparency)
    assert (read_rgb(tmp_path / "image.png") == expected).all()


@pytest.mark.parametrize("kind", ["grey", "rgb", "1-bit", "16-bit"])
def test_transparent_colour_keeps_its_value(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    deep = GREY.astype(np.uint16) * 257
    image, named, expected = {
        "grey": (Image.fromarray(GREY), int(GREY[0, 0]), GREY[..., None]),
        "rgb": (Image.fromarray(RGB), tuple(map(int, RGB[0, 0])), RGB),
        "1-bit": (Image.fromarray(GREY > 127), 0, np.where(GREY > 127, 255, 0)[..., None]),
        "16-bit": (Image.fromarray(deep), int(deep[0, 0]), GREY[..., None]),
    }[kind]
    image.save(path, transparency=named)
    with Image.open(path) as written:
        assert "transparency" in written.info
    assert is_rgb(read_rgb(path)) and (read_rgb(path) == expected).all()


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_alpha_channel_is_dropped_and_colours_are_kept(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{ending}"
    alpha = np.arange(60, dtype=np.uint8).reshape(6, 10, 1) * 4
    Image.fromarray(np.concatenate([RGB, alpha], axis=2)).save(path)
    assert (read_rgb(path) == RGB).all()
    Image.fromarray(np.concatenate([GREY[..., None], alpha], axis=2)).save(path)
    with Image.open(path) as image:
        assert image.mode == "LA"
    assert (grey_of(read_rgb(path)) == GREY).all()


@pytest.mark.parametrize(
    ("inks", "colour"),
    [((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255, 255, 255))],
)
def test_cmyk_jpeg_is_converted_to_rgb(
    inks: tuple[int, int, int, int], colour: tuple[int, int, int], tmp_path: Path
) -> None:
    Image.new("CMYK", (10, 6), inks).save(tmp_path / "image.jpg", quality=100)
    image = read_rgb(tmp_path / "image.jpg")
    assert is_rgb(image) and np.abs(image.astype(int) - colour).max() <= 4


DEEP = np.array([[0, 255, 256, 511], [512, 0x1234, 0x7FFF, 0x8000], [0xABCD, 0xFEFF, 0xFF00, 0xFFFF]], np.uint16)
UPPER = [[0, 0, 1, 1], [2, 0x12, 0x7F, 0x80], [0xAB, 0xFE, 0xFF, 0xFF]]


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_16_bit_grey_keeps_its_upper_eight_bits(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 4 3 65535\n" + DEEP.astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP).save(path)
    assert grey_of(read_rgb(path)).tolist() == UPPER


def test_big_endian_16_bit_grey_is_read_the_same(tmp_path: Path) -> None:
    Image.frombytes("I;16B", (4, 3), DEEP.astype(">u2").tobytes()).save(tmp_path / "image.tiff")
    assert grey_of(read_rgb(tmp_path / "image.tiff")).tolist() == UPPER


def test_floating_point_pixels_are_refused_with_the_reason(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 4), np.float32)).save(tmp_path / "image.tiff")
    with pytest.raises(UnreadableImageError, match="floating-point"):
        read_rgb(tmp_path / "image.tiff")


# EXIF orientation: where the first row and the first column of the stored image are when it is shown upright
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],  # right edge: mirrored
    3: lambda a: a[::-1, ::-1],  # bottom, right: 180 degrees
    4: lambda a: a[::-1],  # bottom, left: upside down
    5: lambda a: a.swapaxes(0, 1),  # left, top: transposed
    6: lambda a: np.rot90(a, -1),  # right, top: 90 degrees clockwise
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),  # right, bottom
    8: lambda a: np.rot90(a, 1),  # left, bottom: 90 degrees anticlockwise
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_exif_orientation_is_applied(orientation: int, ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"image.{ending}"
    Image.fromarray(RGB).save(path, exif=exif)
    assert np.array_equal(read_rgb(path), ORIENTATIONS[orientation](RGB))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation_of_a_jpeg_is_applied(orientation: int, tmp_path: Path) -> None:
    quarters = np.kron(np.array([[0, 80, 120], [160, 200, 255]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(quarters).save(tmp_path / "image.jpg", exif=exif, quality=100)
    image = grey_of(read_rgb(tmp_path / "image.jpg")).astype(int)
    expected = ORIENTATIONS[orientation](quarters)
    assert image.shape == expected.shape and np.abs(image - expected).max() <= 3


def test_exif_orientation_of_16_bit_grey_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(DEEP).save(tmp_path / "image.png", exif=exif)
    assert grey_of(read_rgb(tmp_path / "image.png")).tolist() == np.rot90(UPPER, -1).tolist()


@pytest.mark.parametrize("exif", [b"Exif\0\0nothing of the kind", b"nothing", b"Exif\0\0"])
def test_invalid_exif_is_ignored(exif: bytes, tmp_path: Path) -> None:
    Image.new("RGB", (10, 6), (200, 10, 10)).save(tmp_path / "image.jpg", exif=exif, quality=100)
    assert np.abs(read_rgb(tmp_path / "image.jpg").astype(int) - (200, 10, 10)).max() <= 4


@pytest.mark.parametrize("ending", ["tiff", "webp", "png"])
def test_first_of_several_frames_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{ending}"
    others = [Image.fromarray(255 - RGB), Image.fromarray(RGB // 2)]
    Image.fromarray(RGB).save(
        path, save_all=True, append_images=others, **({"lossless": True} if ending == "webp" else {})
    )
    with Image.open(path) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    assert (read_rgb(path) == RGB).all()


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "jpg"), ("BMP", "png"), ("TIFF", "jpeg"), ("GIF", "png")])
def test_format_is_recognised_by_content_not_extension(kind: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{ending}"
    if kind == "GIF":
        image, expected = palette_image()
    else:
        image, expected = Image.fromarray(RGB), RGB
    image.save(path, format=kind)
    assert (read_rgb(path) == expected).all()


def photograph(path: Path) -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    return path.read_bytes()


@pytest.mark.parametrize("read", [read_rgb, check_whole])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_truncated_file_is_refused(share: float, read: Callable[[Path], Any], ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{ending}"
    whole = photograph(path)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnreadableImageError) as refused:
        read(path)
    assert str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"no image", bytes(range(256)) * 20, b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"]
)
def test_non_images_are_refused_with_a_short_reason(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    for read in (read_rgb, size_of):
        with pytest.raises(UnreadableImageError) as refused:
            read(path)
        text = str(refused.value)
        assert text and "\n" not in text and str(tmp_path) not in text


@pytest.mark.parametrize("ending", [".eps", ".jpg", ".png"])
def test_postscript_is_refused_and_not_run(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript is a program. Pillow runs it with Ghostscript, whatever the extension of the file."""
    proof, ghostscript = tmp_path / "proof", tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {proof}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(ghostscript))
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    for read in (read_rgb, size_of):
        with pytest.raises(UnreadableImageError, match="not an image that Pillow can read"):
            read(path)
    assert not proof.exists()
    with pytest.raises(OSError), Image.open(path) as opened:
        opened.load()
    assert proof.exists()  # Pillow alone does run it


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
    """30,000 x 30,000 pixels in a file of 150 kB: 2.7 GB of RGB."""
    side, pack = 30_000, zlib.compressobj(9)
    rows = b"".join([*(pack.compress(bytes(1 + side // 8)) for _ in range(side)), pack.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert len(content) < 150_000
    for read in (read_rgb, check_whole, size_of):
        with pytest.raises(UnreadableImageError, match=r"900000000 pixels\) exceeds limit of 178956970 pixels"):
            read(path)
    with pytest.raises(DataError, match="exceeds limit"):
        read_picture(path)


def test_damaged_bytes_raise_only_unreadable_image_error(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    path = tmp_path / "image.png"
    whole = photograph(path)
    for number in range(60):
        damaged = bytearray(whole)
        for place in draw.integers(0, 200 if number % 2 else len(whole), 5):
            damaged[place] = draw.integers(0, 256)
        path.write_bytes(bytes(damaged))
        for read in (read_rgb, size_of):
            try:
                read(path)
            except UnreadableImageError as refused:
                assert str(refused)


@pytest.mark.parametrize("read", [read_rgb, size_of])
def test_missing_file_and_folder_are_refused(read: object, tmp_path: Path) -> None:
    assert callable(read)
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UnreadableImageError):
            read(path)


def test_check_whole_accepts_a_readable_image(tmp_path: Path) -> None:
    photograph(tmp_path / "image.jpg")
    check_whole(tmp_path / "image.jpg")
    assert read_rgb(tmp_path / "image.jpg").shape == (64, 64, 3)


def test_images_in_files_are_decoded_on_access(tmp_path: Path) -> None:
    names = ["0.png", "1.png", "2.png"]
    for number, name in enumerate(names):
        Image.fromarray(RGB // (number + 1)).save(tmp_path / name)
    images = ImageFiles(tmp_path, names)
    assert len(images) == 3 and len(ImageSet(images)) == 3
    assert all((images[number] == RGB // (number + 1)).all() for number in range(3))
    Image.fromarray(255 - RGB).save(tmp_path / names[1])
    assert (images[1] == 255 - RGB).all()


def test_image_deleted_or_damaged_later_is_named(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(RGB).save(path)
    images = ImageFiles(tmp_path, ["image.png"])
    assert (images[0] == RGB).all()
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"image\.png"):
        images[0]
    path.unlink()
    with pytest.raises(DataError, match=r"image\.png"):
        images[0]


def labelled(images: Any) -> ImageSet:
    labels = np.array([0, 1, 1, 0, 2, 1, 1, 0, 0, 1, 2, 1, 0], np.int64)
    return ImageSet(images, labels, ("a", "b", "c"), [f"{i}.png" for i in range(13)])


@pytest.mark.parametrize("kind", ["array", "list", "files"])
@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_val_fraction_of_each_class_is_held_out(kind: str, fraction: float, tmp_path: Path) -> None:
    pixels = np.arange(13, dtype=np.uint8).repeat(12).reshape(13, 2, 2, 3)
    images: Any = pixels
    if kind == "list":
        images = list(pixels)
    if kind == "files":
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / f"{number}.png")
        images = ImageFiles(tmp_path, [f"{i}.png" for i in range(13)])
    whole, test = labelled(images), labelled(list(pixels))
    splits = hold_out(Splits(whole, test, notes=("a note",)), fraction)
    assert splits.test is test and splits.notes == ("a note",) and splits.val is not None
    assert whole.labels is not None and splits.val.labels is not None and splits.train.labels is not None
    counts = [round(n * fraction) for n in (5, 6, 2)]
    assert np.bincount(splits.val.labels, minlength=3).tolist() == counts
    numbers = []
    for part in (splits.train, splits.val):
        assert part.names is not None and part.labels is not None and part.classes == whole.classes
        assert len(part) == len(part.names) == len(part.labels)
        for image, label, name in zip(part.images, part.labels, part.names, strict=True):
            number = int(image[0, 0, 0])
            assert name == f"{number}.png" and label == whole.labels[number] and (image == number).all()
            numbers.append(number)
    assert sorted(numbers) == list(range(13))
    again = hold_out(Splits(whole, test), fraction)
    assert again.val is not None and list(again.val.names or []) == list(splits.val.names or [])


def test_impossible_val_fraction_is_refused() -> None:
    pixels = np.zeros((13, 2, 2, 3), np.uint8)
    for splits, fraction in (
        (Splits(labelled(pixels)), 0.01),
        (Splits(ImageSet(pixels)), 0.5),
        (Splits(labelled(pixels)), 0.99),
    ):
        with pytest.raises(DataError, match="--val-fraction"):
            hold_out(splits, fraction)


def in_mode(mode: str, width: int, height: int) -> Image.Image:
    """Noise in one of Pillow's modes."""
    draw = np.random.default_rng(5)
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 2**16, (height, width)).astype(np.uint16))
    noise = Image.fromarray(draw.integers(0, 256, (height, width, 4)).astype(np.uint8))
    return noise if mode == "RGBA" else noise.convert("RGB").convert(mode)


@pytest.mark.parametrize("strip", [1, 50, 120, 10_000])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_conversion_in_strips_is_exact(mode: str, strip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "STRIP", strip)
    path = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
    image = in_mode(mode, 17, 23)
    if mode == "P":
        image.save(path, transparency=bytes(range(256)))
    else:
        image.save(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
    expected = np.asarray(image) >> 8 if mode == "I;16" else np.asarray(image.convert("RGB"))
    assert (read_rgb(path) == expected.reshape(23, 17, -1)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_very_large_image_is_halved(
    mode: str, orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "STRIP", 50)
    exif = Image.Exif()
    exif[274] = orientation
    image = in_mode(mode, 17, 23)
    image.save(tmp_path / "image.png", exif=exif)
    monkeypatch.setattr(images, "LARGE", 17 * 23)
    whole = read_rgb(tmp_path / "image.png")
    assert whole.shape[:2] == ((23, 17) if orientation == 1 else (17, 23))
    monkeypatch.setattr(images, "LARGE", 17 * 23 - 1)
    assert (read_rgb(tmp_path / "image.png") == np.asarray(Image.fromarray(whole).reduce(2))).all()
    stored = np.asarray(image.convert("RGB"))
    assert (read_rgb(tmp_path / "image.png", upright=False) == stored).all()  # bounding boxes refer to these pixels
    assert size_of(tmp_path / "image.png") == (17, 23)


@pytest.mark.parametrize("orientation", [1, 6])
def test_very_large_jpeg_is_decoded_at_half_size(
    orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    smooth = Image.fromarray(RGB).resize((102, 68), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "image.jpg", exif=exif, quality=95)
    whole = read_rgb(tmp_path / "image.jpg")
    monkeypatch.setattr(images, "LARGE", 102 * 68 - 1)
    halved = read_rgb(tmp_path / "image.jpg")
    assert halved.shape == ((34, 51, 3) if orientation == 1 else (51, 34, 3))
    assert np.abs(halved.astype(int) - np.asarray(Image.fromarray(whole).reduce(2)).astype(int)).mean() < 1.5


MEASURED = """
import re, sys
from pathlib import Path
from datasets.images import check_whole, quiet, read_rgb

def peak():
    # not getrusage, whose peak includes that of the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before = peak()
with quiet():
    check_whole(Path(sys.argv[1])) if sys.argv[2] == "check" else print(read_rgb(Path(sys.argv[1])).shape)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(("what", "most"), [("check", 400), ("read", 500)])
def test_very_large_image_needs_little_more_memory_than_pillow(what: str, most: int, tmp_path: Path) -> None:
    """An image of 9,000 x 9,000 pixels takes 309 MiB in Pillow. Three copies and an array took 1,087 MiB."""
    side, pack = 9_000, zlib.compressobj(1)
    rows = b"".join([*(pack.compress(bytes(1 + 3 * side)) for _ in range(side)), pack.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    )
    process = runs.start(str(path), what, program=("-c", MEASURED))
    *shape, peak = runs.output_of(process).splitlines()
    assert process.returncode == 0 and shape == ([] if what == "check" else ["(4500, 4500, 3)"])
    assert 300 < float(peak) < most
