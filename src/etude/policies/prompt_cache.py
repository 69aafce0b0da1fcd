"""A cache of encoded prompts in the machine's memory, with a limit.

Every prompt is encoded alone, so encoding a dropped one again gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Key = str | None
"""A prompt. None: the unconditional conditioning of guidance, which is not always the empty prompt."""


class PromptCache:
    """The tensors of each prompt. The least recently used prompt is dropped first.

    The limit is in bytes. The cache may be larger while one batch of prompts is assembled.
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
        """Whether another prompt of the average size would exceed the limit."""
        return bool(self._rows) and self.size + self.size // len(self._rows) > self.limit

    def add(self, prompt: Key, rows: Mapping[str, Tensor]) -> None:
        """Adds one prompt's tensors without regard to the limit, which `trim` enforces."""
        self._rows[prompt] = {name: tensor.cpu() for name, tensor in rows.items()}
        self.size += _bytes(self._rows[prompt])

    def get(self, prompt: Key) -> dict[str, Tensor]:
        """The tensors of a cached prompt, which becomes the most recently used."""
        self._rows[prompt] = self._rows.pop(prompt)
        return self._rows[prompt]

    def clear(self) -> None:
        self._rows, self.size = {}, 0

    def trim(self) -> None:
        """Drops prompts until the cache is within its limit."""
        while self.size > self.limit and self._rows:
            self.size -= _bytes(self._rows.pop(next(iter(self._rows))))


def _bytes(rows: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in rows.values())
