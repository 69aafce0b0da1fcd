"""Rewards with computable expectations: quadratic in closed form, Lipschitz by quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from scipy.special import ndtri

from etude.errors import EtudeError
from etude.theory.arrays import Approximation, Array, Numbers, array, nonnegative, number
from etude.theory.targets import Gaussian, GaussianMixture, Law


class QuadraticReward:
    """The reward `r(x) = -(x - c)^T Q (x - c) + b^T x`, with Q of any signature.

    `Q` is a number (Q I), a diagonal [d] or a matrix [d, d], of which only the symmetric part
    counts. `center` c and `linear` b are numbers (the same in every coordinate) or [d].
    `QuadraticReward(0, linear=b)` is the linear reward. EtudeError if the shapes do not fit.
    """

    def __init__(self, Q: Numbers, center: Numbers = 0.0, linear: Numbers = 0.0):
        self.Q, self.center, self.linear = array(Q, "Q"), array(center, "the center"), array(linear, "the linear term")
        square = self.Q.ndim < 2 or (self.Q.ndim == 2 and self.Q.shape[0] == self.Q.shape[1])
        if not square or self.center.ndim > 1 or self.linear.ndim > 1:
            raise EtudeError(
                f"a quadratic reward's Q {self.Q.shape}, center {self.center.shape} and linear {self.linear.shape} do not "
                "fit: pass a number, [d] or [d, d] for Q, and a number or [d] for the others."
            )
        if self.Q.ndim == 2:
            self.Q = 0.5 * (self.Q + self.Q.T)

    def parts(self, d: int) -> tuple[Array, Array, Array]:
        """Return (Q [d, d], c [d], b [d]); EtudeError if the reward has not d dimensions."""
        sizes = {x.shape[-1] for x in (self.Q, self.center, self.linear) if x.ndim}
        if sizes - {d}:
            raise EtudeError(f"the reward has {max(sizes)} dimensions but the law has {d}: give both the same.")
        Q = self.Q if self.Q.ndim == 2 else np.diag(np.broadcast_to(self.Q, (d,)))
        return Q, np.broadcast_to(self.center, (d,)), np.broadcast_to(self.linear, (d,))

    def __call__(self, x: Numbers) -> Array:
        """Compute the values [...] at points `x` [..., d]; numbers alone also take [n]."""
        x = np.asarray(x, dtype=np.float64)
        scalar = self.Q.ndim == self.center.ndim == self.linear.ndim == 0
        return self.value(x[..., None] if scalar and x.ndim < 2 else x)

    def value(self, x: Array) -> Array:
        """Compute the values [...] at points [..., d]; the last axis is the coordinates'."""
        Q, c, b = self.parts(x.shape[-1])
        z = x - c
        return np.asarray(-np.sum((z @ Q) * z, axis=-1) + x @ b)

    def gradient(self, x: Array) -> Array:
        """Compute the gradient `b - 2 Q (x - c)` at points [..., d]."""
        Q, c, b = self.parts(x.shape[-1])
        return np.asarray(b - 2.0 * (x - c) @ Q)

    def expected(self, law: Law) -> Any:
        """Compute `E r = -tr(Q Cov) - (mean - c)^T Q (mean - c) + b^T mean` of a law or a batch."""
        if isinstance(law, GaussianMixture):
            return float(sum(w * self.expected(part) for w, part in zip(law.weights, law.components, strict=True)))
        value = self.value(law.mu) - law.spectrum @ self._diagonal(law)
        return value if law.batch else float(value)

    def _diagonal(self, law: Gaussian) -> Array:
        """Compute diag(U^T Q U) in the eigenbasis of `law`; tr(Q Cov) needs no more of Q."""
        Q, _, _ = self.parts(law.d)
        return np.diagonal(Q).copy() if law.basis is None else np.sum(law.basis * (Q @ law.basis), axis=0)

    def change(self, mean_shift: Array, middle: Array, spectrum_shift: Array, law: Gaussian) -> Array:
        """Compute the difference of E r between two laws in the eigenbasis of `law`, uncancelled.

        Their means are `middle +- mean_shift/2`, and their eigenvalues differ by `spectrum_shift`.
        """
        return np.asarray(np.sum(mean_shift * self.gradient(middle), axis=-1) - spectrum_shift @ self._diagonal(law))

    def variance(self, law: Law) -> float:
        """Compute Var r = `2 tr(Q C Q C) + g^T C g`, with g the gradient at the mean."""
        if isinstance(law, GaussianMixture):
            means = np.array([self.expected(part) for part in law.components])
            within = np.array([self.variance(part) for part in law.components])
            return float(law.weights @ within + law.weights @ (means - law.weights @ means) ** 2)
        law.single("variance")
        QC, g = self.parts(law.d)[0] @ law.matrix, self.gradient(law.mu)
        return float(2.0 * np.trace(QC @ QC) + g @ law.matrix @ g)

    def squared_gradient(self, law: Law) -> float:
        """Compute E |grad r|^2 = |g|^2 + 4 tr(Q C Q)."""
        if isinstance(law, GaussianMixture):
            return float(sum(w * self.squared_gradient(p) for w, p in zip(law.weights, law.components, strict=True)))
        law.single("squared_gradient")
        Q, g = self.parts(law.d)[0], self.gradient(law.mu)
        return float(g @ g + 4.0 * np.trace(Q @ law.matrix @ Q))

    def __repr__(self) -> str:
        return f"QuadraticReward(Q={self.Q.tolist()}, center={self.center.tolist()}, linear={self.linear.tolist()})"


class LipschitzReward:
    """A reward that is a function, with `|r(x) - r(y)| <= lipschitz |x - y|`.

    `function` takes points [n] on the line, or [n, d], and returns [n]. EtudeError for any other
    function or constant.
    """

    def __init__(self, function: Callable[[Array], Array], lipschitz: float):
        if not callable(function):
            raise EtudeError(f"a Lipschitz reward needs a function of points, got {function!r}: pass a callable.")
        self.function = function
        self.lipschitz = float(nonnegative(number(lipschitz, "the Lipschitz constant"), "the Lipschitz constant"))

    def __call__(self, x: Numbers) -> Array:
        """Compute the values [n] at points `x` [n] or [n, d]."""
        x = np.asarray(x, dtype=np.float64)
        try:
            value = np.asarray(self.function(x), dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise EtudeError(
                f"the reward's function failed on an array of points {x.shape} ({error}): it must take all points at once."
            ) from error
        if value.shape not in (x.shape, x.shape[:-1]):
            raise EtudeError(f"the reward's shape is {value.shape} for points {x.shape}: return one value per point.")
        return value

    def expected(self, law: Law) -> Any:
        """Compute E r as an `Approximation`; an array of values for a batch of laws on the line."""
        if isinstance(law, GaussianMixture):
            parts = [self.expected(part) for part in law.components]
            value = float(law.weights @ np.array(parts, dtype=np.float64))
            return Approximation(value, float(law.weights @ np.array([p.error for p in parts])), parts[0].kind)
        if law.d > 1:
            return self._in_space(law)
        coarse, fine = (self._on_line(law, panels) for panels in (200, 400))
        return fine if law.batch else Approximation(float(fine), float(abs(fine - coarse)) + 1e-14, "quadrature")

    def _on_line(self, law: Gaussian, panels: int, reach: float = 10.0) -> Array:
        """Integrate by composite Gauss-Legendre."""
        nodes, weights = np.polynomial.legendre.leggauss(6)
        half = reach / panels
        z = (np.linspace(-reach + half, reach - half, panels)[:, None] + half * nodes).ravel()
        w = np.tile(half * weights, panels) * np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
        x = law.mu + np.sqrt(law.spectrum) * z
        values = self(x) if law.on_line else self(x[..., None])
        return np.asarray(values @ (w / w.sum()))

    def _in_space(self, law: Gaussian, replicates: int = 16, log2_points: int = 12) -> Approximation:
        """Average over Sobol points; the error is the 95 % half-width over scramblings."""
        from scipy.stats import qmc  # slow to import, and rarely needed

        law.single("a Lipschitz reward in d > 1")
        means = []
        for seed in range(replicates):
            u = qmc.Sobol(law.d, scramble=True, rng=seed).random_base2(log2_points)
            z = ndtri(np.clip(u, 1e-16, 1.0 - 1e-16))
            means.append(float(np.mean(self(law.mu + law.from_eigen(z * np.sqrt(law.spectrum))))))
        half_width = 2.131 * float(np.std(means, ddof=1)) / np.sqrt(replicates)
        return Approximation(float(np.mean(means)), half_width, "quasi-Monte Carlo, 95 % interval")

    def __repr__(self) -> str:
        return f"LipschitzReward({getattr(self.function, '__name__', 'function')}, lipschitz={self.lipschitz:g})"


Reward: TypeAlias = QuadraticReward | LipschitzReward


def as_reward(value: Any) -> Reward:
    """Return the reward itself; EtudeError for any other value, with a way to wrap it."""
    if not isinstance(value, (QuadraticReward, LipschitzReward)):
        raise EtudeError(
            f"the reward is a {type(value).__name__}, whose expectation is unknown: pass a QuadraticReward, or wrap a "
            "function as LipschitzReward(function, lipschitz)."
        )
    return value
