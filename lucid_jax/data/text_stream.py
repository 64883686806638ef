"""Decodes tokens that arrive a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

from lucid_jax.data.tokenizer import Tokenizer

# Earlier tokens to decode with new ones, so that a tokenizer keeps a word's leading space.
_CONTEXT = 8
_REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes the continuation of a prompt, and returns text once its characters are whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = max(0, len(self._ids) - _CONTEXT)
        self._emitted = len(self._ids)

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
        return self._tokenizer.decode(self._ids[self._start :])[len(context) :]

    def _emit(self, text: str) -> str:
        if text:
            self._start = max(0, self._emitted - _CONTEXT)
            self._emitted = len(self._ids)
        return text
