"""Downloads from a local server that can misbehave."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import socket
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from datasets import DataError, download
from datasets.download import Archive, provide
from datasets.images import Progress, Request

CHUNK = 1000
WHOLE = np.random.default_rng(0).bytes(10 * CHUNK + 500)
NAME = "birds.v1.tar.gz"
Manner = Callable[["Handler", bytes], None]


class Source:
    """The files of a server by name, how it replies to the next requests (else by ``answer``), and its requests."""

    def __init__(self, url: str, files: dict[str, bytes]) -> None:
        self.url, self.files = url, files
        self.manners: list[Manner] = []
        self.asked: list[tuple[str, str | None]] = []  # (name, Range)
        self.sent = 0
        self.over = threading.Event()

    def archive(self, name: str = NAME, **changes: Any) -> Archive:
        return Archive(self.url + name, **{"checksum": md5(self.files.get(name, b"")), **changes})


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # http.server's name
        source: Source = self.server.source  # type: ignore[attr-defined]
        name = self.path.rsplit("/", 1)[-1]
        source.asked.append((name, self.headers["Range"]))
        (source.manners.pop(0) if source.manners else answer)(self, source.files.get(name, b""))

    def head(self, status: int, **fields: object) -> None:
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes) -> None:
        self.server.source.sent += len(data)  # type: ignore[attr-defined]
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Overridden: nothing is printed."""


def answer(
    to: Handler, data: bytes, *, ranges: bool = True, share: float = 1.0, claim: int = 0, known: bool = True
) -> None:
    """Sends the requested part of the file, or the first ``share`` of it.

    Content-Length is wrong by ``claim`` bytes, or missing if not ``known``.
    """
    asked = to.headers["Range"] if ranges else None
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
    if asked and start >= len(data):
        to.head(416, Content_Range=f"bytes */{len(data)}", Content_Length=0)
        return
    rest = data[start:]
    fields: dict[str, object] = {"Content_Length": len(rest) + claim} if known else {}
    if asked:
        fields["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    to.head(206 if asked else 200, **fields)
    to.body(rest[: int(share * len(rest))])


half = partial(answer, share=0.5)


def status(code: int) -> Manner:
    return lambda to, data: to.head(code, Content_Length=0)


def from_the_start(code: int, **fields: object) -> Manner:
    """Sends the whole file with any header, even if a range was requested."""

    def manner(to: Handler, data: bytes) -> None:
        to.head(code, **fields)
        to.body(data)

    return manner


def go_to(place: str) -> Manner:
    return lambda to, data: to.head(302, Location=place, Content_Length=0)


def hang(to: Handler, data: bytes) -> None:
    to.server.source.over.wait(3)  # type: ignore[attr-defined]


def half_then_hang(to: Handler, data: bytes) -> None:
    half(to, data)
    hang(to, data)


def half_then_reset(to: Handler, data: bytes) -> None:
    half(to, data)
    to.wfile.flush()
    to.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    to.connection.close()


def chunked_half(to: Handler, data: bytes) -> None:
    to.protocol_version = "HTTP/1.1"
    to.head(200, Transfer_Encoding="chunked")
    to.body(b"%x\r\n%b\r\n" % (len(data) // 2, data[: len(data) // 2]))


def no_http(to: Handler, data: bytes) -> None:
    to.wfile.write(b"220 mail.example\r\nready\r\n")


@contextmanager
def serving(**files: bytes) -> Iterator[Source]:
    """A server of these files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # closing it waits for them
    source = Source(f"http://127.0.0.1:{server.server_port}/data/", dict(files))
    server.source = source  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield source
    finally:
        source.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


def md5(data: bytes) -> str:
    return f"md5:{hashlib.md5(data, usedforsecurity=False).hexdigest()}"


def fetch(root: Path | None, *archives: Archive, progress: Progress = lambda items, *_: items) -> None:
    provide(Request(root, strict=False, download=True, boxes=False, progress=progress), archives)


def refusal(root: Path | None, *archives: Archive) -> str:
    with pytest.raises(DataError) as refused:
        fetch(root, *archives)
    text = str(refused.value)
    assert "\n" not in text and "\r" not in text
    assert refused.value.__context__ is None or refused.value.__suppress_context__  # the traceback shows one error
    return text


def listing(root: Path) -> dict[str, bytes]:
    """All files below the root except the lock, including hidden ones. Names of folders end in a slash."""
    entries = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.name != download.LOCK}
    return {n + "/" * p.is_dir(): b"" if p.is_dir() else p.read_bytes() for n, p in sorted(entries.items())}


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as file:  # type: ignore[call-overload]
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


BIRDS = tar(("birds/list.txt", b"1 2 3"), ("birds/images/1.jpg", WHOLE), ("attributes.txt", b"not used"))
UNPACKED = {"birds/": b"", "birds/images/": b"", "birds/images/1.jpg": WHOLE, "birds/list.txt": b"1 2 3"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK", CHUNK)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def source() -> Iterator[Source]:
    with serving(**{NAME: WHOLE}) as source:
        yield source


@pytest.fixture
def birds() -> Iterator[Source]:
    with serving(**{NAME: BIRDS}) as source:
        yield source


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / f"{NAME}.part"


def test_file_is_fetched_once_and_the_root_is_created(source: Source, tmp_path: Path) -> None:
    root = tmp_path / "all" / "data"
    fetch(root, source.archive())
    fetch(root, source.archive())
    assert listing(root) == {NAME: WHOLE}
    assert source.asked == [(NAME, None)]


def test_archive_is_fetched_once_and_only_its_folder_unpacked(birds: Source, tmp_path: Path) -> None:
    fetch(tmp_path, birds.archive(unpacks_to="birds"))
    fetch(tmp_path, birds.archive(unpacks_to="birds"))
    assert listing(tmp_path) == {NAME: BIRDS, **UNPACKED}
    assert birds.asked == [(NAME, None)]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_archive_without_top_folder_is_unpacked_into_one(mode: str, source: Source, tmp_path: Path) -> None:
    source.files["lists.tar"] = tar(("train.mat", b"1"), ("sub/test.mat", b"2"), mode=mode)
    fetch(tmp_path, source.archive("lists.tar", unpacks_to="lists"))
    (tmp_path / "lists.tar").unlink()
    assert listing(tmp_path) == {"lists/": b"", "lists/sub/": b"", "lists/sub/test.mat": b"2", "lists/train.mat": b"1"}


@pytest.mark.parametrize("members", [[("list.txt", b"1")], [("birds/list.txt", b"1")]], ids=["no folder", "folder"])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_unpacked_folder_follows_the_umask(
    umask: int, members: list[tuple[str, bytes]], source: Source, tmp_path: Path
) -> None:
    source.files[NAME] = tar(*members)
    before = os.umask(umask)
    try:
        fetch(tmp_path / "data", source.archive(unpacks_to="birds"))
        assert (tmp_path / "data" / "birds").stat().st_mode & 0o777 == 0o777 & ~umask
    finally:
        os.umask(before)


def test_only_missing_archives_are_fetched(source: Source, tmp_path: Path) -> None:
    source.files |= {"a": b"first", "b": b"second", "c.tar": tar(("x", b"third"))}
    (tmp_path / "a").write_bytes(b"first")
    fetch(tmp_path, source.archive("a"), source.archive("b"), source.archive("c.tar", unpacks_to="c"))
    assert [name for name, _ in source.asked] == ["b", "c.tar"]
    assert (tmp_path / "b").read_bytes() == b"second" and (tmp_path / "c" / "x").read_bytes() == b"third"


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_file_copied_by_hand_is_verified_without_network(kind: str, tmp_path: Path) -> None:
    archive = Archive(f"http://127.0.0.1:9/{NAME}", f"{kind}:{hashlib.new(kind, BIRDS).hexdigest()}", "birds")
    (tmp_path / NAME).write_bytes(BIRDS)
    fetch(tmp_path, archive)
    assert listing(tmp_path) == {NAME: BIRDS, **UNPACKED}


@pytest.mark.parametrize("unpacks_to", ["birds", None])
@pytest.mark.parametrize(
    "content",
    [BIRDS[:-1], BIRDS[: len(BIRDS) // 2], b"", BIRDS + b"\0", BIRDS[:500] + b"?" + BIRDS[501:]],
    ids=["a byte short", "half", "empty", "a byte long", "altered"],
)
def test_damaged_file_is_refused_and_left_unchanged(
    content: bytes, unpacks_to: str | None, birds: Source, tmp_path: Path
) -> None:
    (tmp_path / NAME).write_bytes(content)
    archive = birds.archive(unpacks_to=unpacks_to)
    text = refusal(tmp_path, archive)
    assert text.startswith(f"{tmp_path / NAME}: ") and archive.checksum in text
    assert "move it away" in text and "--download" in text
    assert listing(tmp_path) == {NAME: content}
    assert birds.asked == []


@pytest.mark.parametrize("content", [{}, {"mine.txt": b"mine"}], ids=["empty", "other"])
def test_existing_unpacked_folder_is_left_unchanged(content: dict[str, bytes], birds: Source, tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    for name, data in content.items():
        (tmp_path / "birds" / name).write_bytes(data)
    fetch(tmp_path, birds.archive(unpacks_to="birds"))
    assert listing(tmp_path) == {"birds/": b""} | {f"birds/{name}": data for name, data in content.items()}
    assert birds.asked == []


@pytest.mark.parametrize("have", [1, CHUNK, 10_001])
def test_partial_download_is_resumed_by_a_range_request(have: int, source: Source, tmp_path: Path, part: Path) -> None:
    part.write_bytes(WHOLE[:have])
    fetch(tmp_path, source.archive())
    assert listing(tmp_path) == {NAME: WHOLE}
    assert source.asked == [(NAME, f"bytes={have}-")] and source.sent == len(WHOLE) - have


def test_download_restarts_if_the_server_ignores_ranges(source: Source, tmp_path: Path, part: Path) -> None:
    part.write_bytes(b"x" * 4000)
    source.manners = [partial(answer, ranges=False)]
    fetch(tmp_path, source.archive())
    assert listing(tmp_path) == {NAME: WHOLE}
    assert source.asked == [(NAME, "bytes=4000-")]


def test_complete_partial_file_is_used_without_a_download(source: Source, tmp_path: Path, part: Path) -> None:
    part.write_bytes(WHOLE)
    fetch(tmp_path, source.archive())
    assert listing(tmp_path) == {NAME: WHOLE} and source.sent == 0


@pytest.mark.parametrize("wrong", [WHOLE + b"more", b"?" * len(WHOLE), b"?" * 200], ids=["longer", "other", "start"])
def test_partial_download_of_another_file_is_discarded(
    wrong: bytes, source: Source, tmp_path: Path, part: Path
) -> None:
    part.write_bytes(wrong)
    assert source.archive().url in refusal(tmp_path, source.archive())
    assert listing(tmp_path) == {}
    fetch(tmp_path, source.archive())
    assert listing(tmp_path) == {NAME: WHOLE}


@pytest.mark.parametrize("wrong", [b"<html>log in</html>", b"", WHOLE[:-1], WHOLE + b"\0"])
def test_download_with_a_wrong_checksum_is_refused_and_removed(wrong: bytes, source: Source, tmp_path: Path) -> None:
    archive = source.archive(unpacks_to="birds")
    source.files[NAME] = wrong
    text = refusal(tmp_path, archive)
    assert archive.url in text and archive.checksum in text and str(tmp_path / NAME) in text
    assert listing(tmp_path) == {}


def test_reply_with_another_range_is_refused(source: Source, tmp_path: Path, part: Path) -> None:
    part.write_bytes(WHOLE[:4000])
    source.manners = [from_the_start(206)]
    refusal(tmp_path, source.archive())
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("manner", [half, half_then_reset, half_then_hang])
def test_broken_connection_is_resumed(
    manner: Manner, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if manner is half_then_hang:
        monkeypatch.setattr(download, "TIMEOUT", 0.5)
    source.manners = [manner, status(503)]
    fetch(tmp_path, source.archive())
    assert listing(tmp_path) == {NAME: WHOLE}
    first, second, third = (asked for _, asked in source.asked)
    assert first is None and second == third and second is not None
    came = int(second.removeprefix("bytes=").removesuffix("-"))
    assert len(WHOLE) // 2 - CHUNK <= came <= len(WHOLE) // 2  # at most the current chunk is lost
    assert source.sent == len(WHOLE) // 2 + len(WHOLE) - came


def test_partial_download_is_resumed_by_the_next_run(source: Source, tmp_path: Path, part: Path) -> None:
    source.manners = [half] * 3
    text = refusal(tmp_path, source.archive())
    came = len(WHOLE) - -(-len(WHOLE) // 8)  # half of the rest three times, rounded down
    assert source.archive().url in text and str(tmp_path / NAME) in text and str(came) in text
    assert listing(tmp_path) == {part.name: WHOLE[:came]}
    fetch(tmp_path, source.archive())
    assert listing(tmp_path) == {NAME: WHOLE}
    assert [asked for _, asked in source.asked] == [None, "bytes=5250-", "bytes=7875-", f"bytes={came}-"]


def test_interrupted_download_keeps_the_partial_file(source: Source, tmp_path: Path, part: Path) -> None:
    def stopped(items: Iterable[bytes], *_: object) -> Iterator[bytes]:
        for number, item in enumerate(items):
            if number == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path, source.archive(), progress=stopped)
    assert listing(tmp_path) == {part.name: WHOLE[: 3 * CHUNK]}


@pytest.mark.parametrize(
    "manner",
    [
        partial(answer, known=False),
        from_the_start(200, Content_Length="many"),
        from_the_start(200, Content_Length=-5),
        partial(answer, claim=700),
    ],
    ids=["missing", "not a number", "negative", "too long"],
)
def test_missing_or_too_large_content_length_is_ignored(manner: Manner, source: Source, tmp_path: Path) -> None:
    source.manners = [manner]
    fetch(tmp_path, source.archive())
    assert listing(tmp_path) == {NAME: WHOLE}


def test_too_small_content_length_is_refused(source: Source, tmp_path: Path) -> None:
    source.manners = [partial(answer, claim=-700)] * 3
    refusal(tmp_path, source.archive())
    assert NAME not in listing(tmp_path)


def test_redirect_is_followed_with_the_same_range(source: Source, tmp_path: Path, part: Path) -> None:
    source.files["elsewhere"] = WHOLE
    source.manners = [go_to("/mirror/elsewhere")]
    part.write_bytes(WHOLE[:4000])
    fetch(tmp_path, source.archive())
    assert listing(tmp_path) == {NAME: WHOLE}
    assert source.asked == [(NAME, "bytes=4000-"), ("elsewhere", "bytes=4000-")]


def check_instructions(text: str, archive: Archive, root: Path) -> None:
    assert text.startswith(f"{archive.url}: cannot be fetched: ")
    assert f" {root / NAME} " in text and archive.checksum in text and "--download" in text


@pytest.mark.parametrize(
    ("manner", "why"),
    [
        (status(404), "HTTP 404 Not Found"),
        (status(403), "HTTP 403"),
        (status(500), "HTTP 500"),
        (hang, "timed out"),
        (half_then_hang, "was lost"),
        (half_then_reset, "was lost"),
        (chunked_half, "was lost"),
        (no_http, "220 mail.example"),
        (go_to(NAME), "infinite loop"),
        (go_to("file:///etc/passwd"), "HTTP 302"),
    ],
)
def test_server_failure_is_reported_with_manual_instructions(
    manner: Manner, why: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if manner in (hang, half_then_hang):
        monkeypatch.setattr(download, "TIMEOUT", 0.3)
    source.manners = [manner] * 50
    text = refusal(tmp_path, source.archive())
    check_instructions(text, source.archive(), tmp_path)
    assert why in text
    left = listing(tmp_path)
    assert left.keys() <= {f"{NAME}.part"} and all(WHOLE.startswith(data) for data in left.values())


def test_redirect_to_an_invalid_address_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def redirected(*_: Any, **__: Any) -> None:  # urllib would leave its socket open
        raise ValueError("Invalid IPv6 URL")

    monkeypatch.setattr("urllib.request.urlopen", redirected)
    archive = Archive(f"http://127.0.0.1:9/{NAME}", md5(WHOLE))
    text = refusal(tmp_path, archive)
    check_instructions(text, archive, tmp_path)
    assert "Invalid IPv6 URL" in text


def test_failed_server_leaves_the_partial_file_unchanged(source: Source, tmp_path: Path, part: Path) -> None:
    part.write_bytes(WHOLE[:4000])
    source.manners = [status(500)] * 3
    refusal(tmp_path, source.archive())
    assert listing(tmp_path) == {part.name: WHOLE[:4000]}


def test_missing_network_is_reported_with_manual_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        archive = Archive(f"http://127.0.0.1:{nobody_listens.getsockname()[1]}/{NAME}", md5(BIRDS), unpacks_to="birds")
        text = refusal(tmp_path, archive)
    check_instructions(text, archive, tmp_path)
    assert "refused" in text

    def no_names(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    archive = Archive(f"https://data.example/{NAME}", md5(BIRDS), unpacks_to="birds")
    text = refusal(tmp_path, archive)
    check_instructions(text, archive, tmp_path)
    assert "Name or service not known" in text
    assert listing(tmp_path) == {}


PLAIN = tar(("birds/1", b"1"), ("birds/2", bytes(5000)), mode="w")
COMPRESSOR = zlib.compressobj(wbits=31)  # gzip's
BAD_DEFLATE = COMPRESSOR.compress(tar(("birds/1", bytes(10**6)), mode="w")[:900_000]) + COMPRESSOR.flush(
    zlib.Z_FULL_FLUSH
)


@pytest.mark.parametrize(
    "content",
    [
        BIRDS[:-200],
        PLAIN[:3000],
        BAD_DEFLATE + b"\xff" * 100,
        gzip.compress(PLAIN[:3000]) + b"garbage",
        b"no archive",
        b"",
    ],
    ids=["truncated", "truncated tar", "bad deflate", "bad gzip", "not an archive", "empty"],
)
def test_archive_that_cannot_be_unpacked_leaves_no_folder(content: bytes, source: Source, tmp_path: Path) -> None:
    source.files[NAME] = content
    text = refusal(tmp_path, source.archive(unpacks_to="birds"))
    assert text.startswith(f"{tmp_path / NAME}: cannot be unpacked") and "move it away" in text
    assert listing(tmp_path) == {NAME: content}


@pytest.mark.parametrize("have", ["birds/list.txt", "birds/images/1.jpg"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_unpacking_is_repeated(
    error: BaseException, have: str, birds: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = tarfile.TarFile.makefile

    def stopped(self: tarfile.TarFile, info: tarfile.TarInfo, path: Any) -> None:
        make(self, info, path)
        if info.name == have:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "makefile", stopped)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError) as refused:
            fetch(tmp_path, birds.archive(unpacks_to="birds"))
    if isinstance(refused.value, DataError):
        assert str(tmp_path) in str(refused.value) and "No space left on device" in str(refused.value)
    assert listing(tmp_path) == {NAME: BIRDS}
    fetch(tmp_path, birds.archive(unpacks_to="birds"))
    assert listing(tmp_path) == {NAME: BIRDS, **UNPACKED}


@pytest.fixture(params=[True, False], ids=["filters", "no filters"])
def filters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python before 3.10.12 and 3.11.4 has no extraction filters."""
    if not request.param:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.mark.parametrize(
    "evil",
    [
        [("../escaped", b"x")],
        [("birds/../../escaped", b"x")],
        [link("birds/out", "../../escaped")],
        [link("birds/out", "/etc/passwd")],
        [link("birds/out", "../../escaped", tarfile.LNKTYPE)],
        [link("birds/out", ".."), link("birds/further", "out/../../escaped")],
        [link("birds/out", "birds/missing", tarfile.LNKTYPE)],
    ],
)
@pytest.mark.usefixtures("filters")
def test_archive_with_paths_outside_its_folder_is_refused(evil: list[Any], source: Source, tmp_path: Path) -> None:
    root = tmp_path / "data"
    source.files[NAME] = tar(("birds/list.txt", b"1"), *evil)
    assert str(root / NAME) in refusal(root, source.archive(unpacks_to="birds"))
    assert listing(tmp_path) == {"data/": b"", f"data/{NAME}": source.files[NAME]}


@pytest.mark.usefixtures("filters")
def test_absolute_paths_in_an_archive_write_nothing_outside(source: Source, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    source.files[NAME] = tar(("birds/list.txt", b"1"), (str(outside), b"x"))
    fetch(tmp_path / "data", source.archive(unpacks_to="birds"))
    assert not outside.exists() and list(listing(tmp_path / "data" / "birds")) == ["list.txt"]


def test_folder_created_during_unpacking_is_not_overwritten(
    birds: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = tarfile.TarFile.extractall

    def extract_then_create_folder(self: tarfile.TarFile, *args: Any, **options: Any) -> None:
        extract(self, *args, **options)
        (tmp_path / "birds").mkdir()
        (tmp_path / "birds" / "mine").write_bytes(b"mine")

    monkeypatch.setattr(tarfile.TarFile, "extractall", extract_then_create_folder)
    refusal(tmp_path, birds.archive(unpacks_to="birds"))
    assert listing(tmp_path) == {NAME: BIRDS, "birds/": b"", "birds/mine": b"mine"}


def test_missing_root_is_refused_with_the_option() -> None:
    assert "--data-root" in refusal(None, Archive(f"http://127.0.0.1:9/{NAME}", md5(b"")))


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_root_that_cannot_be_created_is_named(root: str, source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    text = refusal(tmp_path / root, source.archive())
    assert str(tmp_path / root) in text and "--data-root" in text
    assert listing(tmp_path) == {"file": b"mine"} and source.asked == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_root_is_named(source: Source, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    text = refusal(tmp_path, source.archive())
    assert str(tmp_path) in text and "Permission denied" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
def test_full_disk_is_reported(source: Source, tmp_path: Path, part: Path) -> None:
    part.symlink_to("/dev/full")
    text = refusal(tmp_path, source.archive())
    assert str(tmp_path) in text and "No space left on device" in text and "cannot be fetched" not in text
    assert not (tmp_path / NAME).exists() and len(source.asked) == 1


def test_progress_counts_downloaded_and_verified_mebibytes(source: Source, tmp_path: Path, part: Path) -> None:
    seen: list[list[Any]] = []

    def counting(items: Iterable[bytes], what: str, total: int, unit: str) -> Iterator[bytes]:
        seen.append([what, total, unit, 0, 0])
        for item in items:
            seen[-1][3] += 1
            seen[-1][4] += len(item)
            yield item

    part.write_bytes(WHOLE[:4000])
    fetch(tmp_path, source.archive(), progress=counting)
    assert seen == [
        [f"downloading {NAME}", 7, "MiB", 7, 6500],
        [f"verifying {NAME}", 11, "MiB", 11, 10500],
    ]


def test_chunk_is_one_mebibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert download.CHUNK == 2**20


def test_concurrent_download_to_the_same_root_is_refused(birds: Source, tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / download.LOCK):
        assert "another process is downloading to it" in refusal(tmp_path, birds.archive(unpacks_to="birds"))
        assert not (tmp_path / "birds").exists()
    fetch(tmp_path, birds.archive(unpacks_to="birds"))
    assert (tmp_path / "birds").is_dir()
