"""Text of tokens that arrive a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

from lucid_jax.data.tokenizer import Tokenizer

# Enough for a tokenizer to see that its text goes on, so that it keeps a leading space.
_CONTEXT = 8
_UNKNOWN = "\ufffd"


class TextStream:
    """Gives text as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = max(0, len(self._ids) - _CONTEXT)
        self._given = len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """The text of new tokens and of those held back, empty while a character is not whole."""
        self._ids.extend(ids)
        text = self._text()
        # Bytes of a character whose last ones are to come.
        return "" if text.endswith(_UNKNOWN) else self._give(text)

    def close(self) -> str:
        """What was held back, and will not become whole."""
        return self._give(self._text())

    def _text(self) -> str:
        """That of the tokens not given yet, as they stand behind those before."""
        before = self._tokenizer.decode(self._ids[self._start : self._given])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._start = max(0, self._given - _CONTEXT)
            self._given = len(self._ids)
        return text
