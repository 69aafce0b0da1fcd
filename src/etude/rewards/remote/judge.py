"""A vision-language model as judge, behind an OpenAI-compatible endpoint: `POST URL/chat/completions`.

    pointwise    score / 10, the score from 0 to 10 that the model gives to an image,      range [0, 1]
    pairwise     the mean over an image's opponents in its group of 1, 1/2 or 0,           range [0, 1]

Pairwise, every pair is asked twice, each image once as A and once as B, since judges favour a place
(Zheng et al. 2023, arXiv 2306.05685). Two answers that disagree, like an answer "tie", are a tie, 1/2
for both. The pairwise rewards of a whole group sum to half its size.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.errors import EtudeError, brief, unknown
from etude.files import append_line, atomic_write_text
from etude.rewards.remote.client import Client, Metadata, RemoteReward, all_or_none
from etude.rewards.remote.wire import encode_image

MODES = ("pointwise", "pairwise")
QUESTIONS = {
    "pointwise": "An image was made for this prompt: {prompt}\nRate from 0 to 10 how well it shows what the prompt says and how "
    "good it looks; 10 is the best. Answer with the number alone.",
    "pairwise": "Two images, A and then B, were made for this prompt: {prompt}\nWhich one shows better what the prompt says and "
    "looks better? Answer with A, B or tie alone.",
}
"""The questions; `{prompt}` is replaced by the prompt."""


class VLMJudge(RemoteReward):
    """A judge at a url such as `http://127.0.0.1:8000/v1`, named `vlm_judge:URL#model=NAME,mode=pairwise`.

    The model's licence is its own. The key is the token of the url's host (`token_for`): for
    api.openai.com the environment variable ETUDE_REWARD_TOKEN_API_OPENAI_COM. It is never written
    anywhere. Requests are repeated as those of `RemoteReward`. Answers are asked for at temperature 0
    and remembered, so that the same question about the same images is asked once.

    Args:
        url: the endpoint, without `/chat/completions`.
        model: the model's name at the endpoint.
        mode: pointwise or pairwise.
        opponents: pairwise, the number of images behind each one in its group that it is compared with,
            in a ring. 0: all others, n (n - 1) questions for a group of n.
        question: text file that replaces the question and holds `{prompt}`.
        cache: file in which answers are remembered beyond the process. Default: none.
        max_tokens: longest answer.
        connection: timeout, concurrency, retries and backoff of `RemoteReward`.

    Raises:
        EtudeError: an option is invalid; in a call, the endpoint fails or the model answers otherwise.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        mode: str = "pointwise",
        opponents: int = 0,
        question: str = "",
        cache: str = "",
        max_tokens: int = 64,
        timeout: float = 60.0,
        concurrency: int = 4,
        retries: int = 4,
        backoff: float = 1.0,
    ) -> None:
        endpoint = f"{url.rstrip('/')}/chat/completions"
        super().__init__(endpoint, timeout=timeout, concurrency=concurrency, retries=retries, backoff=backoff)
        if not model:
            raise EtudeError(f"vlm_judge names no model of {url}: write vlm_judge:{url}#model=NAME.")
        if mode not in MODES:
            raise unknown("mode of vlm_judge", mode, MODES)
        if opponents < 0 or max_tokens < 1:
            raise EtudeError(
                f"opponents = {opponents} and max_tokens = {max_tokens} of vlm_judge: give at least 0 and 1."
            )
        self.model, self.mode, self.opponents, self.max_tokens = model, mode, opponents, max_tokens
        self.whole_groups = int(mode == "pairwise")
        self.least_images = 1 + self.whole_groups
        self.question_file = Path(os.path.expanduser(question)) if question else None
        self.question = QUESTIONS[mode] if self.question_file is None else _read_question(self.question_file)
        self.cache_file = Path(os.path.expanduser(cache)) if cache else None
        self.answers = {} if self.cache_file is None else _read_cache(self.cache_file)

    @classmethod
    def from_options(cls, text: str = "") -> VLMJudge:
        """Builds the reward from the text after the colon of its name: `URL#model=NAME,key=value`."""
        judge = cls.from_name(text)
        assert isinstance(judge, cls)
        return judge

    def files(self) -> dict[str, Path]:
        """The file of the question, if it is not the built-in one."""
        return {} if self.question_file is None else {str(self.question_file): self.question_file}

    async def _all(self, images: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        pictures = [encode_image(image) for image in images]
        async with self._client() as client:
            if self.mode == "pointwise":
                asked = [
                    self._ask(client, prompt, [picture]) for prompt, picture in zip(prompts, pictures, strict=True)
                ]
                answers = await all_or_none([asyncio.ensure_future(each) for each in asked])
                return torch.tensor(answers, dtype=torch.float32)
            pairs = _pairs(prompts, metadata["groups"], self.opponents)
            asked = [self._compare(client, prompts[i], pictures[i], pictures[j]) for i, j in pairs]
            answers = await all_or_none([asyncio.ensure_future(each) for each in asked])
        won, met = torch.zeros(len(prompts)), torch.zeros(len(prompts))
        for (i, j), share in zip(pairs, answers, strict=True):
            won[i], won[j] = won[i] + share, won[j] + 1 - share
            met[i], met[j] = met[i] + 1, met[j] + 1
        return won / met

    async def _compare(self, client: Client, prompt: str, first: str, second: str) -> float:
        """1 if the first picture wins in both places, 0 if the second does, and 1/2 otherwise."""
        orders = [self._ask(client, prompt, order) for order in ([first, second], [second, first])]
        there, back = await all_or_none([asyncio.ensure_future(each) for each in orders])
        return there if there == 1 - back else 0.5

    async def _ask(self, client: Client, prompt: str, pictures: list[str]) -> float:
        """The answer to a question about one picture or two, in [0, 1]; one about two says how sure A wins."""
        text = self.question.replace("{prompt}", prompt)
        identity = json.dumps([self.model, self.mode, text, pictures])
        key = hashlib.sha256(identity.encode()).hexdigest()
        if key not in self.answers:
            async with self._turn():
                self._remember(key, await self._answer(client, text, pictures))
        return self.answers[key]

    async def _answer(self, client: Client, text: str, pictures: list[str]) -> float:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        content += [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{p}"}} for p in pictures]
        body = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens}
        said = ""
        for _ in range(self.retries + 1):
            messages = [{"role": "user", "content": content}]
            status, answer = await self._attempts(client, "POST", json.dumps({**body, "messages": messages}).encode())
            self._check(status, answer, "expected 200 and a chat completion")
            said = self._said(answer)
            if (value := READINGS[self.mode](said)) is not None:
                return value
            content = [
                *content,
                {"type": "text", "text": f"You answered {said[:200]!r}. Answer as asked, in one word."},
            ]
        wanted = "a number from 0 to 10" if self.mode == "pointwise" else "A, B or tie"
        raise EtudeError(
            f"{self.url}: model '{self.model}' answered {self._hide_token(said)[:80]!r} {self.retries + 1} times, where {wanted} "
            "is expected: take another model, or a question that asks for that alone."
        )

    def _said(self, answer: bytes) -> str:
        """The text of a chat completion."""
        try:
            said = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            said = None
        if not isinstance(said, str):
            raise EtudeError(f"{self.url}: status 200{self._quote(answer)} is no chat completion: check the url.")
        return said

    def _remember(self, key: str, value: float) -> None:
        self.answers[key] = value
        if self.cache_file is not None:
            append_line(self.cache_file, json.dumps({"question": key, "answer": value}))


def score_said(said: str) -> float | None:
    """A score in [0, 1] from the only number in an answer: `7`, `7.5/10`, `7 out of 10`; None for anything else."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"\s*(?:/|\bout of\b)\s*10\b(?!\.\d)", "", said))
    return float(numbers[0]) / 10 if len(numbers) == 1 and 0 <= float(numbers[0]) <= 10 else None


def winner_said(said: str) -> float | None:
    """1 for an answer A, 0 for B, 1/2 for tie; None for anything else. A word before it, as in "Image A", is allowed."""
    words = re.findall(r"\b(A|B|tie|Tie|TIE)\b", said)
    return {"A": 1.0, "B": 0.0, "TIE": 0.5}[words[0].upper()] if len(words) == 1 else None


READINGS: dict[str, Any] = {"pointwise": score_said, "pairwise": winner_said}


def _pairs(prompts: list[str], groups: list[int], opponents: int) -> list[tuple[int, int]]:
    """The rows of each pair: all of a group, or those up to `opponents` apart in its ring."""
    pairs = set()
    for group in dict.fromkeys(groups):
        rows = [row for row, other in enumerate(groups) if other == group]
        if len(rows) < 2:
            raise EtudeError(
                f"there is one image of the prompt {prompts[rows[0]]!r}, and a pairwise vlm_judge compares the images of a prompt: "
                "draw at least 2 of each, by images_per_prompt."
            )
        reach = min(opponents or len(rows) - 1, len(rows) - 1)
        ring = [(place, (place + step) % len(rows)) for place in range(len(rows)) for step in range(1, reach + 1)]
        pairs |= {(rows[min(pair)], rows[max(pair)]) for pair in ring}
    return sorted(pairs)


def _read_question(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EtudeError(
            f"the question of vlm_judge, '{path}', cannot be read as UTF-8 text: {brief(error)}."
        ) from None
    if "{prompt}" not in text:
        raise EtudeError(
            f"the question of vlm_judge, '{path}', does not hold {{prompt}}: write it where the prompt belongs."
        )
    return text.strip()


def _read_cache(path: Path) -> dict[str, float]:
    """The answers in a file, by the digest of their question; a torn last line is removed."""
    if not path.exists():
        return {}
    try:
        *lines, torn = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EtudeError(f"the cache of vlm_judge, '{path}', cannot be read as UTF-8 text: {brief(error)}.") from None
    if torn:
        atomic_write_text(path, "".join(f"{line}\n" for line in lines))
    answers: dict[str, float] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            answers[str(row["question"])] = value = float(row["answer"])
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            value = -1.0
        if not 0 <= value <= 1:
            raise EtudeError(
                f"the cache of vlm_judge, '{path}', line {number} is no answer: delete that line, or the file."
            )
    return answers
