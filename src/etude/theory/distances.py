"""W2 and KL between Gaussian laws, in forms that stay accurate for nearly equal laws."""

from __future__ import annotations

from typing import Any

import numpy as np

from etude.errors import EtudeError
from etude.theory.arrays import Array, plain
from etude.theory.targets import Gaussian
from etude.theory.terminal_law import gaussian


def w2(p: Gaussian, q: Gaussian) -> Any:
    """Compute the Wasserstein-2 distance; a number, or an array for batches of laws.

    `W2^2 = |m_p - m_q|^2 + min_R |C_p^(1/2) - C_q^(1/2) R|_F^2` over orthogonal R. The minimum is
    at the polar factor of C_q^(1/2) C_p^(1/2). No traces are subtracted, so nothing cancels.

    Raises:
        EtudeError: the laws have different dimensions.
    """
    _check(p, q)
    squared: Array = np.sum((p.mu - q.mu) ** 2, axis=-1)
    if _same_basis(p, q):
        squared = squared + np.sum((np.sqrt(p.spectrum) - np.sqrt(q.spectrum)) ** 2, axis=-1)
    else:
        root_p, root_q = p.power(0.5), q.power(0.5)
        left, _, right = np.linalg.svd(root_q @ root_p)
        squared = squared + np.sum((root_p - root_q @ (left @ right)) ** 2, axis=(-2, -1))
    return plain(np.sqrt(squared))


def kl(p: Gaussian, q: Gaussian) -> Any:
    """Compute the Kullback-Leibler divergence:

        KL(p || q) = 1/2 [tr(C_q^-1 C_p) - d - log det(C_q^-1 C_p) + |m_p - m_q|^2_(C_q^-1)]

    It is a number, or an array for batches of laws. It is infinite where one law has no variance in
    a direction and the other has, or the means differ in a direction without variance.

    Raises:
        EtudeError: the laws have different dimensions.
    """
    _check(p, q)
    if _same_basis(p, q):
        shift, ratio = p.to_eigen(p.mu - q.mu), _ratio(p.spectrum, q.spectrum)
        distance = _ratio(shift**2, q.spectrum, empty=0.0)
    else:
        whiten = q.power(-0.5)
        ratio = np.asarray(np.linalg.eigvalsh(whiten @ p.matrix @ whiten), dtype=np.float64)
        if np.any(q.spectrum <= 0):
            return plain(np.full(np.broadcast_shapes(p.batch, q.batch), np.inf))
        shift = np.einsum("...ij,...j->...i", whiten, p.mu - q.mu)
        distance = shift**2
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(np.isfinite(ratio) & (ratio > 0), (ratio - 1.0) - np.log1p(ratio - 1.0), np.inf)
    return plain(0.5 * np.sum(each + distance, axis=-1))


def _ratio(numerator: Array, denominator: Array, empty: float = 1.0) -> Array:
    """Divide, with 0/0 = `empty` (a direction in which neither law has variance)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where((numerator == 0) & (denominator == 0), empty, np.divide(numerator, denominator)))


def _check(p: Gaussian, q: Gaussian) -> None:
    for law in (p, q):
        if not isinstance(law, Gaussian):
            gaussian(law, "a distance between laws")
    if p.d != q.d:
        raise EtudeError(
            f"the laws have {p.d} and {q.d} dimensions, so there is no distance between them: give both the same."
        )


def _same_basis(p: Gaussian, q: Gaussian) -> bool:
    return p.basis is q.basis
