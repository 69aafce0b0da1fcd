"""`preference:DIR`: the reward that `etude preferences fit` wrote, for every recipe.

    r(image, prompt) = f(image, prompt) . weight - offset

in logits: images of one prompt that differ by 1 are chosen with odds of e to 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etude.errors import EtudeError, brief
from etude.files import atomic_write_bytes, atomic_write_text
from etude.preferences import davidson
from etude.preferences.features import Backbone, Features, load_backbone
from etude.preferences.pairing import Unsure
from etude.preferences.reward_fit import RewardFit
from etude.rewards.models.weights import read_tensors

HEAD, CARD = "head.safetensors", "reward.json"
KIND = "etude preference reward"


@dataclass(frozen=True)
class Head:
    """A stored reward.

    Attributes:
        backbone: name of the frozen features.
        weight: float32 `[D]`.
        offset: subtracted from every score.
        basis: float32 `[D, k]`.
        covariance: float32 `[k, k]`.
        eta: log nu, or -inf.
        card: what `fit` found out.
        digest: SHA-256 of the weights.
    """

    backbone: str
    weight: Tensor
    offset: float
    basis: Tensor
    covariance: Tensor
    eta: float
    card: dict[str, Any]
    digest: str

    def score(self, features: Tensor) -> Tensor:
        """Rewards `[n]` of features `[n, D]`."""
        return (features.double() @ self.weight.double() - self.offset).float()

    def unsure(self, features: Features) -> Unsure:
        """How much a vote on a pair would teach: the information of the vote times the variance of d.

        (1 - P(tie) - (P(left) - P(right))^2) / 4 * x' C x, with x the difference of the features. A pair
        with an image that has none, as one drawn since, counts as the average pair.
        """
        z = features.values @ self.basis.numpy()
        r = features.values @ self.weight.numpy()
        covariance = self.covariance.numpy()

        def informs(pairs: list[tuple[int, int]]) -> NDArray[np.float64]:
            numbers = np.array(pairs)
            known = np.isin(numbers, features.images).all(axis=1)
            a, b = features.rows(numbers[known]).T
            x = z[a] - z[b]
            information = davidson.information(r[a] - r[b], self.eta)[:, 0, 0]
            taught = np.zeros(len(pairs))
            taught[known] = information * ((x @ covariance) * x).sum(axis=1)
            taught[~known] = taught[known].mean() if known.any() else 1.0
            return taught + 1e-12

        return informs


def write_reward(fit: RewardFit, out: Path) -> None:
    """Writes a fitted reward into a directory: the card last, so that a torn one is none.

    Raises:
        EtudeError: a file cannot be written.
    """
    from safetensors.torch import save

    tensors = {
        "weight": torch.from_numpy(fit.weight).float(),
        "offset": torch.tensor([fit.offset], dtype=torch.float64),
        "basis": torch.from_numpy(fit.basis).float().contiguous(),
        "covariance": torch.from_numpy(fit.covariance).float().contiguous(),
    }
    out.mkdir(parents=True, exist_ok=True)
    data = save(tensors)
    card = {
        "kind": KIND,
        "version": 1,
        "told_from_chance": fit.told_from_chance,
        "eta": fit.eta,
        "head_sha256": hashlib.sha256(data).hexdigest(),
        **fit.card,
    }
    atomic_write_bytes(out / HEAD, data)
    atomic_write_text(out / CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def read_head(directory: Path | str) -> Head:
    """A reward from its directory.

    Raises:
        EtudeError: the directory holds no reward, or a damaged one.
    """
    root = Path(os.path.expanduser(directory))
    try:
        data = (root / CARD).read_bytes()[: 1 << 24]
        card = json.loads(data)
        digest = hashlib.sha256((root / HEAD).read_bytes()).hexdigest()
    except (OSError, ValueError, RecursionError) as error:
        raise EtudeError(
            f"'{directory}' holds no reward ({brief(error, 80)}): give the --out of `etude preferences fit`."
        ) from None
    if not isinstance(card, dict) or card.get("kind") != KIND or card.get("version") != 1:
        raise EtudeError(
            f"'{root / CARD}' is no card of a preference reward: give the --out of `etude preferences fit`."
        )
    if card.get("head_sha256") != digest:
        raise EtudeError(f"'{root / HEAD}' is not the file that '{root / CARD}' describes: fit the reward again.")
    tensors = read_tensors(root / HEAD)
    try:
        weight, basis, covariance = tensors["weight"].float(), tensors["basis"].float(), tensors["covariance"].float()
        offset, eta, backbone = float(tensors["offset"][0]), card["eta"], card["backbone"]
        sound = weight.ndim == 1 and basis.shape == (len(weight), len(covariance)) and covariance.ndim == 2
        sound = sound and all(bool(t.isfinite().all()) for t in (weight, basis, covariance)) and np.isfinite(offset)
        sound = sound and isinstance(backbone, str) and (eta is None or isinstance(eta, float))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
        sound = False
    if not sound:
        raise EtudeError(f"'{root / HEAD}' holds no finite linear reward: fit it again.")
    return Head(backbone, weight, offset, basis, covariance, -np.inf if eta is None else eta, card, digest)


class PreferenceReward:
    """The reward: images uint8 `[n, 3, h, w]` and prompts to float32 `[n]`, in logits."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = str(directory)
        self.head = read_head(directory)
        if not self.head.card.get("told_from_chance"):
            warnings.warn(
                f"the reward of '{directory}' cannot be told from chance on held-out votes: training on it may lead anywhere",
                stacklevel=2,
            )
        self.backbone: Backbone | None = None

    @classmethod
    def from_options(cls, text: str = "") -> Self:
        """The reward of the directory after the colon of `preference:DIR`.

        Raises:
            EtudeError: no directory is named, or it holds no reward.
        """
        if not text:
            raise EtudeError("the reward preference needs the directory of a fit: preference:DIR.")
        return cls(text)

    def load(self) -> None:
        """Reads the weights of the backbone, once."""
        if self.backbone is None:
            self.backbone = load_backbone(self.head.backbone)

    def __call__(self, images: Tensor, prompts: list[str], **metadata: Any) -> Tensor:
        self.load()
        assert self.backbone is not None
        features = torch.cat(self.backbone.describe(images, prompts), dim=1)
        if features.shape[1] != len(self.head.weight):
            raise EtudeError(
                f"the backbone {self.head.backbone} gives {features.shape[1]} features, and the reward of "
                f"'{self.directory}' has {len(self.head.weight)}: fit it again with this backbone."
            )
        return self.head.score(features)

    def offload(self) -> None:
        """Moves the networks of the backbone to the CPU, for `memory.offload`."""
        for value in vars(self.backbone).values() if self.backbone is not None else ():
            if isinstance(value, torch.nn.Module):
                value.to("cpu")

    def revisions(self) -> dict[str, str]:
        """The SHA-256 of the reward's weights, and the commits that the backbone has read."""
        known: dict[str, str] = getattr(self.backbone, "revisions", dict)()
        return {self.directory: self.head.digest, **known}
