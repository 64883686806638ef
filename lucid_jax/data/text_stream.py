"""Decodes tokens that arrive a few at a time."""

from collections.abc import Sequence

from lucid_jax.data.tokenizer import Tokenizer

# Earlier tokens to decode with new ones, so that a tokenizer keeps a word's leading space.
_CONTEXT = 8
_REPLACEMENT = "\ufffd"
# Bytes of the longest character in UTF-8.
_MOST_BYTES = 4


class TextStream:
    """Decodes the continuation of a prompt, and returns text once its characters are whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._emitted = len(self._ids)
        self._start = self._context_start()

    def push(self, ids: Sequence[int]) -> str:
        """Adds tokens; returns the pending text, or "" if its last character is not whole."""
        self._ids.extend(ids)
        text = self._pending_text()
        # The text ends in bytes of a character whose other bytes have not arrived.
        return "" if text.endswith(_REPLACEMENT) else self._emit(text)

    def close(self) -> str:
        """Returns the pending text, even if its last character is not whole."""
        return self._emit(self._pending_text())

    def _pending_text(self) -> str:
        """Decodes the tokens not emitted yet, after the context before them."""
        context = self._tokenizer.decode(self._ids[self._start : self._emitted])
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.startswith(context):
            return text[len(context) :]
        # One bad byte may make a tokenizer replace the good ones before it, which are emitted.
        return self._tokenizer.decode(self._ids[self._emitted :])

    def _emit(self, text: str) -> str:
        if text:
            self._emitted = len(self._ids)
            self._start = self._context_start()
        return text

    def _context_start(self) -> int:
        """Returns where the context of the next tokens starts: not within a character."""
        latest = max(0, self._emitted - _CONTEXT)
        for start in range(latest, max(-1, latest - _MOST_BYTES), -1):
            context = self._tokenizer.decode(self._ids[start : self._emitted])
            if not context.startswith(_REPLACEMENT):
                return start
        return latest
