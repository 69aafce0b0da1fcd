"""Encoded prompts, kept in the machine's memory up to a limit.

Every prompt is encoded alone, so encoding it again gives the same bits: what is dropped costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Key = str | None
"""A prompt; None stands for what guidance starts from, which is not always the empty prompt."""


class PromptCache:
    """The tensors of each prompt, those that were not used for longest dropped first.

    Args:
        limit: bytes that are kept. One batch of prompts may need more, for as long as it is put together.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._rows: dict[Key, dict[str, Tensor]] = {}

    def __contains__(self, prompt: Key) -> bool:
        return prompt in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        """Whether another prompt like those that are kept would be too many."""
        return bool(self._rows) and self.size + self.size // len(self._rows) > self.limit

    def add(self, prompt: Key, rows: Mapping[str, Tensor]) -> None:
        """Keeps one prompt's tensors, whatever the limit: `trim` enforces it."""
        self._rows[prompt] = {name: tensor.cpu() for name, tensor in rows.items()}
        self.size += _bytes(self._rows[prompt])

    def get(self, prompt: Key) -> dict[str, Tensor]:
        """The tensors of a prompt that is kept, which is now the most recently used."""
        rows = self._rows.pop(prompt)
        self._rows[prompt] = rows
        return rows

    def trim(self) -> None:
        """Drops what is beyond the limit."""
        while self.size > self.limit and self._rows:
            self.size -= _bytes(self._rows.pop(next(iter(self._rows))))


def _bytes(rows: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in rows.values())
