"""Whether an image shows the text that its prompt asks for, read by optical character recognition.

    reward = max(0, 1 - d / N)

d is the edit distance between the wanted text and the text that is read, N the length of the wanted
text; d = 0 if the wanted text is part of what is read. It is the reward of Flow-GRPO's text rendering
(arXiv 2505.05470). Case and blanks are ignored. Range [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from etude.errors import EtudeError, brief
from etude.rewards.models.preprocessing import pictures

Reader = Callable[[Image.Image], Sequence[str]]
"""What reads a picture: its lines of text, in reading order."""
_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»')


class OCR:
    """The share of the wanted text that an image shows.

    The wanted text is the field `text` of the prompt's metadata; without it, all that stands in double
    quotes in the prompt. The reader is RapidOCR with PP-OCR's models, which come with its package
    (`pip install 'etude[ocr]'`, Apache-2.0, no download later) and run on the CPU.

    Args:
        reader: another reader. Default: RapidOCR.

    Raises:
        EtudeError: from `load` if RapidOCR is not installed; from a call if a prompt wants no text.
    """

    def __init__(self, reader: Reader | None = None) -> None:
        self.reader = reader

    def load(self) -> None:
        """Reads the models of RapidOCR, once."""
        if self.reader is None:
            self.reader = _rapid_ocr()

    def revisions(self) -> dict[str, str]:
        """The version of RapidOCR, which fixes its models."""
        try:
            return {"rapidocr": version("rapidocr")}
        except PackageNotFoundError:
            return {}

    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        texts = metadata.get("text") or [None] * len(prompts)
        wanted = [wanted_text(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        self.load()
        assert self.reader is not None
        read = [squeezed("".join(self.reader(picture))) for picture in pictures(images.cpu())]
        shares = [share_shown(text, found) for text, found in zip(wanted, read, strict=True)]
        return torch.tensor(shares, dtype=torch.float32)


def wanted_text(prompt: str, text: Any) -> str:
    """The text that a prompt wants, squeezed: the field `text` of its metadata, or what stands in double quotes."""
    if text is None:
        text = "".join("".join(parts) for parts in _QUOTED.findall(prompt))
    if not isinstance(text, str) or not squeezed(text):
        raise EtudeError(
            f"the prompt {prompt!r} wants no text, which the reward ocr compares with: put the text in double quotes, or give "
            "the prompts a field 'text'."
        )
    return squeezed(text)


def squeezed(text: str) -> str:
    """The text in one case and without blanks."""
    return "".join(text.casefold().split())


def share_shown(wanted: str, read: str) -> float:
    """`max(0, 1 - d / N)` of two squeezed texts: 1 if the wanted one is part of what is read."""
    return 1.0 if wanted in read else max(0.0, 1 - edit_distance(wanted, read) / len(wanted))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements from one text to the other."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        corner, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    return row[-1]


def _rapid_ocr() -> Reader:
    """RapidOCR as a reader; its parameters keep the log silent."""
    try:
        from rapidocr import RapidOCR

        engine = RapidOCR(params={"Global.log_level": "critical"})
    except ImportError as error:
        raise EtudeError(
            f"the reward ocr needs RapidOCR and onnxruntime ({brief(error, 80)}): pip install 'etude[ocr]'."
        ) from error
    return lambda picture: engine(picture).txts or ()
