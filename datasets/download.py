"""Downloads archives of published data sets: resumes, verifies and unpacks them, and never overwrites files."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import filelock

from datasets.images import DataError, Request

CHUNK = 2**20
LOCK = ".download.lock"
"""Lock file in the data root during a download."""
TRIES = 3
TIMEOUT = 30.0
"""Seconds without data after which a connection counts as lost."""


@dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        url: its URL.
        checksum: algorithm and hexadecimal digits, such as ``md5:c58f...``.
        unpacks_to: folder in the data root that it is unpacked to, or None if the file is used directly.
    """

    url: str
    checksum: str
    unpacks_to: str | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


class _LostError(Exception):
    """The server cannot be reached, or the connection was lost."""


def provide(request: Request, archives: Sequence[Archive]) -> None:
    """Downloads and unpacks the archives that are missing in the data root.

    An archive that is already there is verified and used. An interrupted download is kept as ``<name>.part`` and
    resumed the next time.

    Raises:
        DataError: the root is not set or cannot be written, a server cannot be reached, or a checksum does not match.
    """
    if request.root is None:
        raise DataError("data_root is not set: pass --data-root with the folder to download to")
    try:
        request.root.mkdir(parents=True, exist_ok=True)
        for archive in archives:
            target = request.root / (archive.unpacks_to or archive.name)
            if not target.exists():
                with filelock.FileLock(request.root / LOCK, timeout=0):
                    if archive.unpacks_to is None:
                        _fetch(archive, request.root, request)
                    elif not target.exists():  # another process may have unpacked it meanwhile
                        _unpack(_fetch(archive, request.root, request), target)
            elif archive.unpacks_to is None:
                _fetch(archive, request.root, request)
    except filelock.Timeout:
        raise DataError(f"{request.root}: another process is downloading to it; wait for that one to end") from None
    except OSError as error:
        raise DataError(
            f"{error.filename or request.root}: cannot be read or written: {error.strerror or error}; fix this, or "
            "choose another --data-root"
        ) from None


def _fetch(archive: Archive, root: Path, request: Request) -> Path:
    """Path of the verified file in the root; downloads it if it is missing."""
    path = root / archive.name
    if path.exists():
        if not _is_published(path, archive, request):
            raise DataError(
                f"{path}: is incomplete or altered: it is not the published file ({archive.checksum}); move it away, "
                "and --download fetches it anew"
            )
        return path
    part = path.with_name(f"{path.name}.part")
    _download(archive, part, request)
    if not _is_published(part, archive, request):
        part.unlink()  # resuming from wrong data would fail again
        raise DataError(
            f"{archive.url}: the downloaded file is not the published one ({archive.checksum}), and was removed; "
            f"try again, or put {archive.name} from another source at {path}"
        )
    return part.replace(path)


def _download(archive: Archive, part: Path, request: Request) -> None:
    """Downloads the rest of ``part``. Raises DataError if the server cannot be reached or the connection is lost."""
    for tries_left in reversed(range(TRIES)):
        try:
            _resume(archive, part, request)
            return
        except _LostError as error:
            if not tries_left:
                raise DataError(
                    f"{archive.url}: cannot be fetched: {error}; run again to resume the download, or put the file "
                    f"({archive.checksum}) from elsewhere at {part.with_suffix('')} and run again with --download"
                ) from None


def _resume(archive: Archive, part: Path, request: Request) -> None:
    have = part.stat().st_size if part.exists() else 0
    try:
        query = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
        answer = urllib.request.urlopen(query, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # the file is complete; the checksum is verified later
        raise _LostError(f"HTTP {error.code} {_reason(error)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: redirect to an invalid URL
        raise _LostError(_reason(error)) from None
    with answer:
        is_partial = answer.status == http.client.PARTIAL_CONTENT  # otherwise the server sends the whole file
        length = getattr(answer, "length", None) or 0  # as Content-Length says
        received = 0
        with part.open("ab" if is_partial else "wb") as file:
            chunks = request.progress(
                _received(answer), f"downloading {archive.name}", math.ceil(length / CHUNK), "MiB"
            )
            for chunk in chunks:
                file.write(chunk)
                received += len(chunk)
    if received < length:
        raise _LostError(f"the connection was lost after {part.stat().st_size} bytes")


def _received(answer: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = answer.read(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _LostError(f"the connection was lost: {_reason(error)}") from None
        if not chunk:
            return
        yield chunk


def _reason(error: Exception) -> str:
    """The error's message on one line."""
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(reason).__name__


def _is_published(path: Path, archive: Archive, request: Request) -> bool:
    kind, digits = archive.checksum.split(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        total = math.ceil(path.stat().st_size / CHUNK)
        chunks = iter(partial(file.read, CHUNK), b"")
        for chunk in request.progress(chunks, f"verifying {archive.name}", total, "MiB"):
            digest.update(chunk)
    return digest.hexdigest() == digits


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Extracts an archive; refuses members outside the folder."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    for member in archive.getmembers():  # Python before 3.10.12 and 3.11.4, Debian 12's among them, has no filters
        member.name = member.name.lstrip("/")
        if not (member.isfile() or member.isdir()) or ".." in PurePosixPath(member.name).parts:
            raise tarfile.TarError(f"{member.name!r} is not a plain file or folder inside it")
    archive.extractall(folder)


def _unpack(path: Path, target: Path) -> None:
    """Unpacks to a temporary folder and renames it, so that an incomplete folder is never used."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    content = temporary / "content"  # with default permissions, unlike mkdtemp's folder
    try:
        content.mkdir()
        with tarfile.open(path) as file:
            _extract(file, content)
        inside = content / target.name  # some archives contain the folder, others only its content
        (inside if inside.is_dir() else content).rename(target)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, LookupError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be unpacked: {_reason(error)}; move it away, and --download fetches it again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
