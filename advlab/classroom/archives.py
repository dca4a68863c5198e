"""Zips that nobody has looked into: read in memory, within bounds, never unpacked to a disk."""

import errno
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from advlab.classroom import RefusedError

END, END_LENGTH, LONGEST_COMMENT = b"PK\x05\x06", 22, 65_535
ZIP64 = b"PK\x06\x07"  # stands before the end of a zip of more than 4 GB
LARGEST_DIRECTORY = 10_000_000  # bytes: of some 100,000 files
PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may take memory without bound
UTF8, ENCRYPTED = 0x800, 0x1  # flags of a member
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, ValueError)


@dataclass(frozen=True)
class Member:
    """A file in a zip.

    Args:
        name: As its author wrote it, with slashes.
        raw: As `zipfile` knows it.
        date: Year, month, day, hour, minute and second of the author's clock, not checked.
        known: Whether the name's encoding is known; else `name` is a guess.
        fault: Why it must not be read, or "".
    """

    name: str
    raw: str
    date: tuple[int, int, int, int, int, int]
    known: bool
    fault: str


@contextmanager
def opened(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """Open a zip.

    Raises:
        OSError: if the disk fails.
        RefusedError: here or in the block, if it is damaged, or lists more than it may.
    """
    try:
        _check_end(file)
        with zipfile.ZipFile(file) as archive:
            yield archive
    except RefusedError:  # a ValueError, too
        raise
    except DAMAGED as error:
        raise RefusedError(f"it cannot be read as a zip: {error}") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place before the file's beginning
            raise RefusedError("it cannot be read as a zip: it is cut") from error
        raise


def _check_end(file: BinaryIO) -> None:
    """Refuse a list of members that would fill the memory: `zipfile` reads all of it at once."""
    size = file.seek(0, 2)
    file.seek(max(0, size - END_LENGTH - LONGEST_COMMENT - 20))  # 20: the sign of ZIP64
    tail = file.read()
    at = tail.rfind(END)
    if at < 0 or len(tail) < at + END_LENGTH:
        raise RefusedError("it is no zip, or its end is missing")
    if tail[max(0, at - 20) :].startswith(ZIP64):
        raise RefusedError("the zip is too large to be read here; unpack it")
    (directory,) = struct.unpack("<L", tail[at + 12 : at + 16])
    if directory > LARGEST_DIRECTORY:
        raise RefusedError("the zip lists too many files")


def members(archive: zipfile.ZipFile) -> list[Member]:
    """Return the files in a zip: no folders, no links."""
    found = [info for info in archive.infolist() if not info.is_dir() and _is_regular(info)]
    often = Counter(info.filename for info in found)
    return [_member(info, often[info.filename] > 1) for info in found]


def _is_regular(info: zipfile.ZipInfo) -> bool:
    return stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)


def _member(info: zipfile.ZipInfo, twice: bool) -> Member:
    name, known = info.filename, True
    if not info.flag_bits & UTF8 and not name.isascii():
        # macOS does not say that it wrote UTF-8. What else it may be cannot be known.
        try:
            name = name.encode("cp437").decode()
        except UnicodeError:
            known = False
    outside = name.startswith("/") or ".." in PurePosixPath(name.replace("\\", "/")).parts
    fault = "it leads out of the zip" if outside else "it is in the zip twice" if twice else ""
    return Member(name, info.filename, info.date_time, known, fault)


def read(archive: zipfile.ZipFile, raw: str, largest: int) -> bytes:
    """Return what a member holds.

    Raises:
        RefusedError: if it has more than `largest` bytes, is encrypted, or packed in a rare way.
    """
    info = archive.getinfo(raw)
    if info.flag_bits & ENCRYPTED:
        raise RefusedError("the zip is encrypted")
    if info.compress_type not in PLAIN:
        raise RefusedError("the zip is packed in a rare way; pack it anew as a plain zip")
    if info.file_size > largest:
        raise RefusedError(f"the file has {info.file_size / 1e6:.0f} MB")
    with archive.open(info) as file:
        return file.read(largest)
