"""The cached list of the files of a large folder, and when the folder is listed again."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import datasets
import synthetic
from datasets import Splits, files, inventory
from datasets.inventory import Inventory, Listing, Names
from runs import output_of, start

FILE_NAMES = st.lists(st.binary(max_size=12).map(lambda text: os.fsdecode(text.replace(b"\0", b"/"))), max_size=8)


@given(FILE_NAMES)
def test_packed_names_of_any_bytes_are_unpacked_unchanged(names: list[str]) -> None:
    packed = Names(names)
    assert len(packed) == len(names)
    assert [packed[i] for i in range(len(names))] == names == list(packed)
    assert list(Names(packed=packed.packed.copy())) == names


@given(FILE_NAMES, st.slices(10), st.integers(-12, 12))
def test_packed_names_are_indexed_like_a_list(names: list[str], part: slice, place: int) -> None:
    packed = Names(names)
    assert packed[part] == names[part]
    if -len(names) <= place < len(names):
        assert packed[place] == packed[np.int64(place)] == names[place]
    else:
        with pytest.raises(IndexError):
            packed[place]


def test_packed_names_are_searched_like_a_list() -> None:
    packed = Names(name for name in ("a", "b b", "c\nd", ""))
    assert "c\nd" in packed and "d" not in packed and packed.index("b b") == 1 and next(reversed(packed)) == ""
    assert list(Names()) == [] and not Names()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder. Every split counts as too large for the memory, so every one is cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    return tmp_path / "cache" / "anchor-neighbourhoods"


class Opened:
    """Counts the image files that are opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        for name in ("read_rgb", "check_whole", "size_of"):
            monkeypatch.setattr(files, name, self.counting(getattr(files, name)))

    def counting(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Path, **how: Any) -> Any:
            self.paths.append(path)
            return work(path, **how)

        return counted

    def by(self, work: Callable[[], Any]) -> int:
        """Number of different files that ``work`` opens."""
        self.paths.clear()
        work()
        return len(set(self.paths))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(monkeypatch)


def content(splits: Splits) -> Any:
    """Everything that a load returns, including all pixels."""
    parts = []
    for images in (splits.train, splits.test):
        if images is not None:
            labels = None if images.labels is None else images.labels.tolist()
            pixels = [image.tobytes() for image in images.images]
            parts.append((list(images.names or []), labels, images.classes, pixels))
    return parts, splits.skipped, splits.notes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Seven images of two classes, one of them damaged, unchanged for a minute."""
    root = tmp_path / "root"
    for number in range(4):
        synthetic.save(root / "train" / "ab"[number % 2] / f"{number}.png", number)
    for number in (4, 5):
        synthetic.save(root / "test" / "b" / f"{number}.png", number)
    (root / "train" / "a" / "bad.png").write_bytes(b"no image")
    synthetic.age(root)
    return root


def load(root: Path) -> Splits:
    return datasets.load("folder", root)


def test_second_load_opens_no_file_and_gives_the_same_result(root: Path, opened: Opened) -> None:
    first = content(load(root))
    assert opened.by(lambda: load(root)) == 0
    assert content(load(root)) == first
    assert [name for name, _ in first[1]] == ["train/a/bad.png"]


def test_ignored_files_are_reported_in_each_run(root: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train" / "a" / "6.xyz").write_bytes(b"no image")
    synthetic.age(root)
    first = content(load(root))
    assert sorted(name for name, _ in first[1]) == ["train/a/6.xyz", "train/a/bad.png"]
    assert opened.by(lambda: load(root)) == 0
    assert content(load(root)) == first
    monkeypatch.setattr(files, "formats", lambda: ("PNG", "HEIF"))
    assert opened.by(lambda: load(root)) == 8
    (root / "train" / "a" / "6.xyz").write_bytes(
        (root / "train" / "b" / "1.png").read_bytes()
    )  # its folder's modification time does not change
    assert "train/a/6.xyz" in list(load(root).train.names or [])


@pytest.mark.parametrize("name", ["imagenet", "cub200", "dogs"])
def test_every_data_set_of_files_is_cached(name: str, tmp_path: Path, opened: Opened) -> None:
    root = tmp_path / name
    {"imagenet": synthetic.imagenet, "cub200": synthetic.cub200, "dogs": synthetic.dogs}[name](root)
    synthetic.age(root)
    first = content(datasets.load(name, root))
    assert opened.by(lambda: datasets.load(name, root)) == 0
    assert content(datasets.load(name, root)) == first
    if name != "imagenet":
        again: list[Splits] = []
        assert opened.by(lambda: again.append(datasets.load(name, root, boxes=True))) == 0
        assert content(again[0])[0][0][0] == first[0][0][0] and again[0].train.images[0].shape[1] == 20


def test_cached_split_that_fits_in_memory_is_loaded(
    root: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content(load(root))
    monkeypatch.setattr(files, "IN_MEMORY", 2**30)
    assert isinstance(load(root).train.images, list) and content(load(root)) == first


def test_small_collections_are_not_cached(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "IN_MEMORY", 2**30)
    load(root)
    assert not cache.exists()


def test_nothing_is_written_to_the_image_folder(root: Path) -> None:
    before = sorted(root.rglob("*"))
    load(root)
    assert sorted(root.rglob("*")) == before


def add(root: Path) -> None:
    synthetic.save(root / "train" / "b" / "9.png", 9)


def add_class(root: Path) -> None:
    (root / "train" / "c").mkdir()


def add_deeper(root: Path) -> None:
    (root / "train" / "a" / "deep").mkdir()
    synthetic.save(root / "train" / "a" / "deep" / "9.png", 9)


def remove(root: Path) -> None:
    (root / "train" / "b" / "1.png").unlink()


def rename(root: Path) -> None:
    (root / "train" / "b" / "1.png").rename(root / "train" / "b" / "8.png")


def rename_class(root: Path) -> None:
    (root / "train" / "a").rename(root / "train" / "d")


def replace(root: Path) -> None:
    synthetic.save(root / "new.png", 9)
    (root / "new.png").replace(root / "train" / "b" / "1.png")


def repair(root: Path) -> None:
    with (root / "train" / "a" / "bad.png").open("wb") as file:  # the folder's modification time does not change
        file.write((root / "train" / "b" / "3.png").read_bytes())


@pytest.mark.parametrize("change", [add, add_class, add_deeper, remove, rename, rename_class, replace, repair])
def test_changed_folder_is_read_again(
    change: Callable[[Path], None], root: Path, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(root)
    change(root)
    changed: list[Splits] = []
    assert opened.by(lambda: changed.append(load(root))) > 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert content(changed[0]) == content(load(root))


def test_change_of_one_split_keeps_the_other_cached(root: Path, opened: Opened) -> None:
    load(root)
    (root / "test" / "b" / "4.png").unlink()
    assert opened.by(lambda: load(root)) == 1


def test_repaired_file_of_equal_size_is_detected_by_its_time(root: Path, opened: Opened) -> None:
    path = root / "train" / "a" / "bad.png"
    path.write_bytes(b"x" * (root / "train" / "b" / "1.png").stat().st_size)
    synthetic.age(root)
    assert len(load(root).skipped) == 1
    path.write_bytes((root / "train" / "b" / "1.png").read_bytes())
    assert load(root).skipped == ()


def test_changed_image_list_invalidates_the_cache(tmp_path: Path, opened: Opened) -> None:
    synthetic.cub200(tmp_path)
    synthetic.age(tmp_path)
    home = tmp_path / "CUB_200_2011"
    first = content(datasets.load("cub200", tmp_path))
    for list_of in ("images", "train_test_split"):
        path = home / f"{list_of}.txt"
        before = path.read_text()
        path.write_text("\n".join(before.splitlines()[:-1]) + "\n")
        if list_of == "images":
            assert opened.by(lambda: datasets.load("cub200", tmp_path)) == 5  # the five images of the changed split
            assert len(datasets.load("cub200", tmp_path).test or []) == 5
        else:
            path.write_text(before.replace("\n12 0", "\n12 1"))
            assert len(datasets.load("cub200", tmp_path).train) == 7
        path.write_text(before)
        assert content(datasets.load("cub200", tmp_path)) == first


@pytest.mark.parametrize("inside", ["train", "train/a"])
def test_recently_changed_folder_is_not_cached(inside: str, root: Path, cache: Path, opened: Opened) -> None:
    then = time.time() - 1
    os.utime(root / inside, (then, then))
    load(root)
    assert opened.by(lambda: load(root)) == 5
    assert len(list(cache.iterdir())) == 1  # the test split


def test_folder_with_a_future_modification_time_is_not_cached(root: Path, opened: Opened) -> None:
    synthetic.age(root / "train" / "b", seconds=-3600)
    load(root)
    assert opened.by(lambda: load(root)) == 5


def test_folder_that_changes_during_listing_is_not_cached(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size_of = files.size_of

    def slow(path: Path) -> tuple[int, int]:
        if not (root / "train" / "b" / "late.png").exists():
            synthetic.save(root / "train" / "b" / "late.png", 9)
        return size_of(path)

    monkeypatch.setattr(files, "size_of", slow)
    assert len(load(root).train) == 4
    assert len(load(root).train) == 5


def test_copies_of_a_root_do_not_share_a_cache(root: Path, tmp_path: Path, opened: Opened) -> None:
    load(root)
    other = tmp_path / "other"
    shutil.copytree(root, other)
    assert opened.by(lambda: load(other)) == 7


def test_other_paths_to_the_same_root_share_the_cache(
    root: Path, tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(root)
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for spelling in (Path("root"), Path("link"), tmp_path / "link" / "train" / ".."):
        assert opened.by(lambda spelling=spelling: load(spelling)) == 0


def test_without_xdg_cache_home_the_home_folder_is_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(root)
    assert len(list((tmp_path / "home" / ".cache" / "anchor-neighbourhoods").glob("*.npz"))) == 2


def test_missing_home_folder_is_noted_and_run_continues(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    splits = load(root)
    assert len(splits.train) == 4 and all("home" in note and "every file again" in note for note in splits.notes)


@pytest.mark.parametrize("where", ["cache", "cache/anchor-neighbourhoods"])
def test_unwritable_cache_folder_is_logged_and_run_continues(
    where: str, root: Path, tmp_path: Path, opened: Opened
) -> None:
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_text("a file where the folder should be")
    splits = load(root)
    assert len(splits.train) == 4 and len(splits.notes) == 2
    assert all(str(tmp_path / "cache") in note and "every file again" in note for note in splits.notes)
    assert opened.by(lambda: load(root)) == 7


def test_full_disk_is_noted_and_leaves_no_file(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **arrays: Any) -> None:
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    splits = load(root)
    assert len(splits.train) == 4 and all("No space left on device" in note for note in splits.notes)
    assert list(cache.iterdir()) == []


def test_interrupted_write_leaves_no_file(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert list(cache.iterdir()) == []


def test_cache_files_are_private_to_the_user(root: Path, cache: Path) -> None:
    load(root)
    assert len(list(cache.iterdir())) == 2
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in cache.iterdir())


KEY = "some"


def write_cache(root: Path, names: tuple[str, ...] = ("train/a/0.png", "train/a/bad.png")) -> Inventory:
    """Lists two files, the second of which is damaged, and caches the result."""
    taken = inventory.take(root, KEY, lambda: Listing(names, ["train", "train/a"]))
    sizes = np.array([[40, 40], [0, 0]], np.int32)
    found = Inventory(KEY, taken.names, taken.folders, sizes, {names[1]: "a reason"}, taken.changed)
    inventory.remember(root, found)
    return found


def read_cache(root: Path) -> Inventory | None:
    """The cached list, or None if the folder is listed again."""
    listed_again: list[bool] = []
    found = inventory.take(root, KEY, lambda: listed_again.append(True) or Listing([], []))  # type: ignore[func-returns-value]
    return None if listed_again else found


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_cached_inventory_is_read_back_unchanged(root: Path) -> None:
    kept, found = write_cache(root), read_cache(root)
    assert found is not None and found.sizes is not None and kept.sizes is not None
    assert (list(found.names), list(found.folders)) == (list(kept.names), list(kept.folders))
    assert np.array_equal(found.sizes, kept.sizes) and found.sizes.dtype == np.int32
    assert found.reasons == {"train/a/bad.png": "a reason"} and found.key == KEY


def test_file_names_that_are_not_utf8_are_kept(root: Path) -> None:
    odd = (os.fsdecode(b"train/a/\xff\n \xc3.png"), os.fsdecode(b"train/a/sp ace\xfe.png"))
    try:
        shutil.copy(root / "train" / "a" / "0.png", root / odd[0])
        (root / odd[1]).write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system accepts valid UTF-8 names only")
    synthetic.age(root)
    first = content(load(root))
    assert odd[0] in first[0][0][0] and odd[1] in dict(first[1])
    assert content(load(root)) == first
    write_cache(root, odd)
    assert list((read_cache(root) or write_cache(root)).names) == list(odd)


def test_truncated_cache_file_is_ignored(root: Path, cache: Path) -> None:
    write_cache(root)
    path = only_file(cache)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert read_cache(root) is None, length
    path.write_bytes(whole)
    assert read_cache(root) is not None


def test_damaged_cache_file_is_ignored_or_read_correctly(root: Path, cache: Path) -> None:
    kept = write_cache(root)
    path = only_file(cache)
    whole = path.read_bytes()
    accepted = 0
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        if found := read_cache(root):  # for instance, the byte was in a time stamp of the archive
            accepted += 1
            assert list(found.names) == list(kept.names) and np.array_equal(found.sizes, kept.sizes)
            assert found.reasons == kept.reasons and list(found.folders) == list(kept.folders)
    assert accepted < len(whole) / 13 / 2


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("form", ["array", "archive", "pickle"])
def test_code_in_a_cache_file_is_not_run(form: str, root: Path, cache: Path, tmp_path: Path) -> None:
    write_cache(root)
    path, trace = only_file(cache), tmp_path / "ran"
    evil = np.array([Evil(trace)], dtype=object)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    with path.open("wb") as file:
        if form == "array":
            np.save(file, evil, allow_pickle=True)
        elif form == "archive":
            np.savez(file, allow_pickle=True, **{**arrays, "names": evil})
        else:
            file.write(evil.dumps())
    trace.unlink(missing_ok=True)
    assert read_cache(root) is None and not trace.exists()
    np.load(path, allow_pickle=True)["names" if form == "archive" else ...]
    assert trace.exists()  # the code does run if the file is trusted


def test_cache_file_of_another_version_root_or_key_is_ignored(root: Path, cache: Path, tmp_path: Path) -> None:
    write_cache(root)
    path = only_file(cache)
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    other = Names([str(tmp_path), KEY]).packed
    for change in ({"form": np.array(inventory.FORM + 1)}, {"key": other}, {"sizes": arrays["sizes"][:1]}):
        np.savez(path, **{**arrays, **change})
        assert read_cache(root) is None
    for name in arrays:
        np.savez(path, **{key: value for key, value in arrays.items() if key != name})
        assert read_cache(root) is None
    np.savez(path, **arrays)
    assert read_cache(root) is not None


def test_damaged_cache_file_is_replaced_at_the_next_load(root: Path, cache: Path, opened: Opened) -> None:
    first = content(load(root))
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert opened.by(lambda: load(root)) == 7
    assert opened.by(lambda: load(root)) == 0
    assert content(load(root)) == first


LOAD = """
import os, signal, sys
from pathlib import Path
import datasets
from datasets import files, inventory


def half(file, **content):
    file.write(bytes(1000))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


files.IN_MEMORY = 0
if sys.argv[2] == "killed":
    inventory.np.savez = half
print(len(datasets.load("folder", Path(sys.argv[1])).train))
"""


def loading(root: Path, how: str) -> subprocess.Popen[str]:
    """A process that loads a root."""
    return start(str(root), how, program=("-c", LOAD))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_partial_files_of_killed_processes_are_removed(root: Path, cache: Path, opened: Opened) -> None:
    process = loading(root, "killed")
    output_of(process)
    assert process.returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert left.suffix == ".part" and left.stat().st_size == 1000
    os.utime(left, (0, 0))  # long ago
    assert opened.by(lambda: load(root)) == 7
    assert opened.by(lambda: load(root)) == 0
    assert not left.exists() and not list(cache.glob("*.part"))


def test_concurrent_loads_leave_one_complete_file_per_split(root: Path, cache: Path, opened: Opened) -> None:
    both = [loading(root, "whole") for _ in range(2)]
    assert [output_of(process).strip() for process in both] == ["4", "4"]
    assert not list(cache.glob("*.part"))
    assert opened.by(lambda: load(root)) == 0 and len(load(root).train) == 4


def test_deleted_root_is_listed_again(root: Path) -> None:
    write_cache(root)
    shutil.rmtree(root)
    assert read_cache(root) is None
