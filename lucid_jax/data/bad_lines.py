"""Skips or refuses documents that cannot be read: a line that is not JSON, a file in Latin-1."""

from collections.abc import Sequence

from absl import logging

from lucid_jax.data.documents import BadDocumentError, Document, Source

# Bad documents that are logged one by one.
_LOGGED = 5


class BadLines:
    """Skips and counts the bad documents of some sources, or lets the first end the run."""

    def __init__(self, name: str, action: str):
        """Counts what is read for `name`; `action` is `data.on_bad_line`."""
        self._name = name
        self._skips = action == "skip"
        # By message, because every epoch meets the same documents; a dict keeps the order.
        self._found: dict[str, None] = {}

    def read(self, source: Source, index: int) -> Document | None:
        """Returns a document, or None for one that is skipped."""
        try:
            return source[index]
        except BadDocumentError as error:
            if not self._skips:
                raise
            if str(error) not in self._found:
                self._found[str(error)] = None
                if len(self._found) <= _LOGGED:
                    logging.warning("%s skips a document: %s", self._name, error)
            return None

    def found(self) -> list[str]:
        """Returns what was wrong with each document that was skipped."""
        return list(self._found)

    def log_count(self) -> None:
        """Logs how many documents were skipped, if any was."""
        if message := describe_skipped(self._name, self.found()):
            logging.warning("%s", message)


def describe_skipped(name: str, found: Sequence[str]) -> str:
    """Returns a line about the documents that were skipped, "" if none was."""
    if not found:
        return ""
    documents = "1 document" if len(found) == 1 else f"{len(found)} documents, the first"
    return f"{name} skipped {documents}: {found[0]}"


class Guarded:
    """A source whose bad documents are None, or errors, as `bad_lines` decides."""

    def __init__(self, source: Source, bad_lines: BadLines):
        self._source = source
        self._bad_lines = bad_lines

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Document | None:
        return self._bad_lines.read(self._source, index)
