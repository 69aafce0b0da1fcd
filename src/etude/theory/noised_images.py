"""Training on final images, whose expectation is closed form for Gaussian images: a pull, and a penalty."""

from __future__ import annotations

import numpy as np

from etude.theory.affine_policy import End, Weights, square_slope
from etude.theory.arrays import Array
from etude.theory.laws import ScoreError, as_score_error
from etude.theory.levels import Levels
from etude.theory.targets import Gaussian


def matching_ascent(
    target: Gaussian,
    grid: Levels,
    unit: Array,
    weights: Weights,
    images: tuple[Array, Array],
    end: End,
    score_error: ScoreError | None = None,
) -> Weights:
    """Compute the expected step of advantage-weighted matching, the step of NFT at the old policy.

    Images x0 ~ N(m + delta, S) are noised again, x = a x0 + s eps, and the network's x0_hat at x is
    pulled towards x0 with the weight A = r(x0) - E r, in its own unit:

        E[A (x0 - x0_hat(x)) / unit  (w^T, 1)],      w = (a^2 C + s^2)^(-1/2) (x - a m)

    `images` is (delta [etas, d], S [etas, d, d]) in the eigenbasis, and `end` the reward of x0 - m. The moments are Stein's, with
    g = E grad r and Q the reward's: Cov(r, x0) = S g =: h and
    Cov(r, (x0 - m)(x0 - m)^T) = -2 S Q S + h delta^T + delta h^T.
    """
    delta, S = images
    d = target.d
    h = (S @ (end.p - 2.0 * (end.P @ delta[..., None])[..., 0])[..., None])[..., 0]
    T = -2.0 * S @ end.P @ S + h[:, :, None] * delta[:, None, :] + delta[:, :, None] * h[:, None, :]
    a, s = grid.a[:-1, None, None], grid.s[:-1, None, None]
    whiten = 1.0 / np.sqrt(a**2 * target.spectrum + s**2)
    # x0_hat - m = K (x - a m) + offset, as the corrected network and its score error have it.
    K, offset = a * target.spectrum * whiten**2, np.zeros((1, 1, d))
    if error := as_score_error(score_error):
        K = (1.0 - s**2 * whiten**2 * (1.0 + error.gain)) / a
        offset = -s / a * target.to_eigen(error.bias_in(d))
    u = unit[:, None, None]
    gain = u[..., None] * weights.F * whiten[..., None, :]
    gain[..., range(d), range(d)] += K
    f = h - a * (gain @ h[..., None])[..., 0]
    F = a[..., None] * (T - a[..., None] * gain @ T - (offset + u * weights.f)[..., :, None] * h[:, None, :])
    return Weights(F * whiten[..., None, :] / u[..., None], f / u)


def noised_distance_slope(weights: Weights, whiten: Array, a: Array, s: Array, images: tuple[Array, Array]) -> Weights:
    """Compute the gradient of `E |v - v_ref|^2 / 2` on noised images, v in the network's own unit."""
    delta, S = images
    a, s = a[:, None], s[:, None]
    mean = whiten * a[..., None] * delta
    cov = a[..., None, None] ** 2 * S + s[..., None, None] ** 2 * np.eye(delta.shape[-1])
    second = whiten[..., None] * cov * whiten[..., None, :] + mean[..., :, None] * mean[..., None, :]
    return square_slope(weights, mean, second)
