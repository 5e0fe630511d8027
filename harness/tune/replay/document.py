"""The JSON documents that tuners leave, read entry by entry, so that a file that was cut short or hurt gives up what is whole in it."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from klab.harness.tune.replay.decimal_text import decoder, thawed
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

# What holds the entries: `cache` of Kernel Tuner, an object; `results` of T4, an array.
CONTAINERS = ("cache", "results")
GZIP_MAGIC = b"\x1f\x8b"
# Small pieces: what is inflated with the piece where the damage begins is lost.
_PIECE = 512
_SPACE = re.compile(r"[ \t\n\r]*")
# An entry of a cache begins on a line of its own, as Kernel Tuner appends it.
_NEXT = re.compile(r'\n\s*("[^"\n]*"\s*:\s*\{)')


@dataclass
class Document:
    """A file's fields, and its entries in order (their numbers as `decimal_text.decoder` leaves them).

    container: the field the entries were in, "" where there is none. dropped_bytes: what could not be read as an entry or a field.
    """

    path: Path
    fields: dict[str, Json] = field(default_factory=dict)
    entries: list[dict[str, Json]] = field(default_factory=list)
    container: str = ""
    dropped_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def read_document(path: Path) -> Document:
    """Decompress where the content is gzip, and read. UsageError for a file that cannot be read, is empty or no JSON object.

    RecursionError for one that nests a thousand levels.
    """
    document = Document(path)
    body = _text(document)
    if not body.strip():
        raise UsageError(f"{path}: {document.notes[0]}, and that is nothing" if document.notes else f"{path} is empty")
    if not body.lstrip().startswith("{"):
        raise UsageError(f"{path} is no recorded space: it is not a JSON object, as Kernel Tuner's cache and T4 files are")
    _Reader(document, body).read()
    return document


def _text(document: Document) -> str:
    path = document.path
    try:
        if not path.is_file():
            raise UsageError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if content.startswith(GZIP_MAGIC):
        content = _unzipped(document, content)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        if len(content) - error.start >= 4:  # else a character was cut at the end
            raise UsageError(f"{path} is no recorded space: it is not text (byte {error.start})") from error
        document.dropped_bytes += len(content) - error.start
        return content[: error.start].decode()


def _unzipped(document: Document, content: bytes) -> bytes:
    """All members of a gzip file; of one that ends early or is hurt, what comes before."""
    parts = []
    while content.startswith(GZIP_MAGIC):
        inflate = zlib.decompressobj(wbits=31)
        try:
            for at in range(0, len(content), _PIECE):
                parts.append(inflate.decompress(content[at : at + _PIECE]))
                if inflate.eof:
                    break
        except zlib.error:
            document.notes.append("the compressed file is damaged; kept is what comes before the damage")
            break
        if not inflate.eof:
            document.notes.append("the compressed file ends early; kept is what there is")
            break
        content = inflate.unused_data + content[at + _PIECE :]
    return b"".join(parts)


class _Reader:
    def __init__(self, document: Document, body: str) -> None:
        self._document = document
        self._body = body
        self._at = 0

    def read(self) -> None:
        document = self._document
        self._skip("{")
        closed = self._peek() == "}"
        whole_until = self._at
        try:
            while not closed:
                name, value = self._field()
                whole_until = self._at
                if value is not None:
                    document.fields[name] = value
                closed = self._skip(",}") == "}"
                if not closed and self._peek() == "":
                    break
        except (ValueError, IndexError):
            document.dropped_bytes += len(self._body[whole_until:].encode())
            return
        if not closed:
            if document.container and not document.dropped_bytes:
                document.notes.append("the file was not closed by its writer; all its entries are whole")
            return
        rest = self._body[self._at :].strip()
        document.dropped_bytes += len(rest.encode())

    def _field(self) -> tuple[str, Json]:
        """One `"name": value` of the file. Entries go to the document as they come, and their value is None."""
        name, self._at = decoder.raw_decode(self._body, self._space())
        if not isinstance(name, str):
            raise ValueError
        self._skip(":")
        opening = self._peek()
        if name in CONTAINERS and not self._document.container and opening == {"cache": "{", "results": "["}[name]:
            self._document.container = name
            self._entries(keyed=opening == "{")
            return name, None
        value, self._at = decoder.raw_decode(self._body, self._space())
        return name, thawed(value)

    def _entries(self, *, keyed: bool) -> None:
        """All entries up to the end of their container, or of the file. What is no entry is dropped up to the next that is one."""
        end = "}" if keyed else "]"
        self._skip("{[")
        while self._peek() not in ("", end):
            start = self._at
            try:
                if keyed:
                    _, self._at = decoder.raw_decode(self._body, self._space())
                    self._skip(":")
                entry, self._at = decoder.raw_decode(self._body, self._space())
                whole_until = self._at
                if not isinstance(entry, dict):
                    raise ValueError
                if self._peek() not in (",", end, ""):
                    raise ValueError
                self._document.entries.append(entry)
                if self._peek() == ",":
                    self._skip(",")
                elif self._peek() == "":
                    self._at = whole_until
                    return
            except (ValueError, IndexError):
                self._document.dropped_bytes += self._resume(start, keyed)
        if self._peek() == end:
            self._skip(end)

    def _resume(self, start: int, keyed: bool) -> int:
        """Go to where the next entry may begin; the bytes passed over."""
        found = _NEXT.search(self._body, start + 1) if keyed else None
        self._at = found.start(1) if found else len(self._body)
        return len(self._body[start : self._at].encode())

    def _space(self) -> int:
        found = _SPACE.match(self._body, self._at)
        return found.end() if found else self._at

    def _peek(self) -> str:
        at = self._space()
        return self._body[at : at + 1]

    def _skip(self, expected: str) -> str:
        """Step over one of these characters; ValueError when another is there. At the end of the body: nothing."""
        self._at = self._space()
        found = self._body[self._at : self._at + 1]
        if found and found not in expected:
            raise ValueError
        self._at += len(found)
        return found
