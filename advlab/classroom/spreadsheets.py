"""Tables that people and systems keep as CSV, whichever separator and decimal sign they write."""

import csv
import io
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

SEPARATORS = (",", ";", "\t")
NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


@dataclass(frozen=True)
class Sheet:
    """A table as it was read.

    Args:
        rows: Of cells, the first the names of the columns.
        separator: Between cells.
        newline: At the end of a row.
        mark: Whether it begins with a byte order mark.
    """

    rows: list[list[str]]
    separator: str
    newline: str
    mark: bool

    def column(self, *names: str) -> int | None:
        """Return the place of the one column that has any of these names; None without it.

        Raises:
            ValueError: if there are several.
        """
        places = [i for i, one in enumerate(self.rows[0]) if plain(one).lower() in names]
        if len(places) > 1:
            raise ValueError(f"the column {self.rows[0][places[0]]!r} is there {len(places)} times")
        return places[0] if places else None

    def content(self) -> bytes:
        """Return the table as a file holds it."""
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=self.separator, lineterminator=self.newline).writerows(self.rows)
        return text.getvalue().encode("utf-8-sig" if self.mark else "utf-8")


def read(path: Path) -> Sheet:
    """Read a table.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is empty, no UTF-8, or its quotes do not match.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("it is not in UTF-8; save it as “CSV UTF-8”") from error
    first = text.partition("\n")[0]
    separator = max(SEPARATORS, key=first.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise ValueError(f"it is no CSV: {error}") from error
    if not any(rows[:1]):
        raise ValueError("its first line is empty; it needs the names of the columns")
    newline = "\r\n" if "\r\n" in text else "\n"
    return Sheet(rows, separator, newline, content.startswith(b"\xef\xbb\xbf"))


def plain(text: str) -> str:
    """Return a cell without spaces around it, and with its letters written in one way (NFC)."""
    return unicodedata.normalize("NFC", text).strip()


def number(text: str) -> float:
    """Return the number that a cell holds, with a decimal point or comma.

    Raises:
        ValueError: if it is none, or if its comma may separate thousands.
    """
    found = NUMBER.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text.strip()!r} is no number")
    decimals = found[1] or ""
    if decimals.startswith(",") and len(decimals) == 4:
        raise ValueError(f"{text.strip()!r} may be thousands or decimals; write a decimal point")
    return float(found[0].replace(",", "."))
