"""Documents from unpacked packages: the text of neighbouring files, each paragraph once."""

import gzip
import hashlib
import pathlib
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from experiments.real_model.html_text import html_to_text
from experiments.real_model.packages import Package

# Characters of a document at most, some 32,000 tokens, and at least.
LONGEST, SHORTEST = 1 << 17, 1000
# A file with a larger share of characters that are not ASCII is not English.
_FOREIGN = 0.1
# Characters of a paragraph from which on it is left out where it comes again: licences,
# navigation, inherited methods. Shorter ones repeat by chance.
_PARAGRAPH = 100


class Document(NamedTuple):
    """A text, and the folder that its files lie in, `package/path`."""

    folder: str
    text: str


class Texts:
    """Reads documents; remembers the paragraphs of all that it read."""

    def __init__(self):
        self._seen: set[bytes] = set()

    def documents(self, package: Package, directory: pathlib.Path) -> Iterator[Document]:
        """Yields the documents of a package that is unpacked in `directory`.

        A document is the text of consecutive files of one folder, in the order of their names, up
        to `LONGEST` characters; a longer file is split at blank lines.
        """
        folder, pieces, size = "", list[str](), 0
        for path, content in _read(package, directory):
            parent = f"{package.name}/{path.rpartition('/')[0]}"
            for piece in _split(self._new_text(path, content)):
                if parent != folder or size + len(piece) > LONGEST:
                    yield from _join(folder, pieces)
                    folder, pieces, size = parent, [], 0
                pieces.append(piece)
                size += len(piece) + 2
        yield from _join(folder, pieces)

    def _new_text(self, path: str, content: bytes) -> str:
        """Returns the text of a file without the paragraphs that were read before."""
        text = content.decode(errors="replace").replace("\r\n", "\n")
        if ".html" in path:
            text = html_to_text(text)
        if len(text.encode("ascii", "ignore")) < (1 - _FOREIGN) * len(text):
            return ""
        return "\n\n".join(x for x in text.split("\n\n") if x.strip() and self._is_new(x))

    def _is_new(self, paragraph: str) -> bool:
        key = " ".join(paragraph.split())
        if len(key) < _PARAGRAPH:
            return True
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


def _read(package: Package, directory: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields the paths and contents of a package's files, sorted, then those of its archives."""
    for path in sorted(x for x in directory.rglob("*") if x.is_file() and not x.is_symlink()):
        name = str(path.relative_to(directory))
        if package.has(name):
            content = path.read_bytes()
            yield name, gzip.decompress(content) if name.endswith((".gz", ".dz")) else content
        elif name.endswith(".tar.xz"):
            with tarfile.open(path) as archive:
                found = {
                    member.name: file.read()
                    for member in archive
                    if package.has(member.name) and (file := archive.extractfile(member))
                }
            yield from sorted(found.items())


def _split(text: str) -> Iterable[str]:
    """Splits a text at blank lines, or where there are none, into pieces of `LONGEST` at most."""
    while len(text) > LONGEST:
        end = text.rfind("\n\n", 0, LONGEST)
        end = end if end > 0 else LONGEST
        yield text[:end]
        text = text[end:].lstrip("\n")
    if text:
        yield text


def _join(folder: str, pieces: list[str]) -> Iterable[Document]:
    text = "\n\n".join(pieces)
    return [Document(folder, text)] if len(text) >= SHORTEST else []
