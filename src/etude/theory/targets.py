"""Target laws: a Gaussian (scalar, diagonal or full covariance) and a mixture of Gaussians.

A Gaussian holds its mean, the eigenvalues of its covariance and their basis. Every sampler of a
Gaussian target acts on each eigen-direction separately, so one eigendecomposition serves all etas,
horizons and step counts. The law of a sampler is again a `Gaussian` with the same basis; it has
leading batch axes where eta or T is an array.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, array


class Gaussian:
    """The law N(mean, cov).

    `mean` is a number or [d]; `cov` is a variance, variances [d], or a symmetric matrix [d, d]. Two
    numbers make a law on the line: its `mean` and `cov` are numbers and its samples have shape [n].
    Samplers return batches of laws, with `mean` [..., d] and `cov` [..., d] or [..., d, d].

    Raises:
        EtudeError: the shapes do not fit, or `cov` is not symmetric or has a negative eigenvalue.
    """

    mu: Array  # [..., d], in the original coordinates
    spectrum: Array  # [..., d], eigenvalues of the covariance
    basis: Array | None  # [d, d], columns are eigenvectors; None is the identity
    on_line: bool

    def __init__(self, mean: Numbers, cov: Numbers):
        mean, cov = array(mean, "the mean"), array(cov, "the covariance")
        if mean.ndim > 1 or cov.ndim > 2:
            raise EtudeError(
                f"a Gaussian's mean of shape {mean.shape} and covariance of shape {cov.shape} do not fit: pass a number "
                "or [d] for the mean, and a number, [d] or [d, d] for the covariance."
            )
        self.on_line = mean.ndim == 0 and cov.ndim == 0
        d = max(mean.size, cov.shape[-1] if cov.ndim else 1)
        if mean.size not in (1, d) or (cov.ndim and cov.shape != (d,) * cov.ndim):
            raise EtudeError(
                f"the mean has {mean.size} entries but the covariance has shape {cov.shape}: make them agree."
            )
        self.mu = np.broadcast_to(mean, (d,)).copy()
        if cov.ndim < 2:
            self.basis, spectrum = None, np.broadcast_to(cov, (d,)).copy()
        else:
            if np.abs(cov - cov.T).max() > 1e-9 * np.abs(cov).max():
                raise EtudeError("the covariance matrix is not symmetric: pass (C + C.T) / 2 if that is what you mean.")
            spectrum, self.basis = np.linalg.eigh(0.5 * (cov + cov.T))
        if spectrum.min() < -1e-10 * max(float(spectrum.max()), 1e-300):
            raise EtudeError(f"the covariance has the eigenvalue {spectrum.min():g}: a covariance has none below zero.")
        self.spectrum = np.maximum(spectrum, 0.0)

    @classmethod
    def from_spectrum(cls, mu: Array, spectrum: Array, like: Gaussian) -> Gaussian:
        """Make the law with mean `mu` [..., d] and eigenvalues `spectrum` [..., d].

        The mean is in the original coordinates. The basis, and whether the law is on the line, are
        those of `like`.
        """
        law = Gaussian.__new__(Gaussian)
        mu, spectrum = np.broadcast_arrays(mu, spectrum)
        law.mu, law.spectrum, law.basis, law.on_line = mu, spectrum, like.basis, like.on_line
        return law

    @property
    def d(self) -> int:
        """Number of dimensions."""
        return int(self.mu.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        """Shape of the batch; () for one law."""
        return self.mu.shape[:-1]

    @property
    def mean(self) -> Array:
        """Mean, [..., d], or [...] on the line."""
        return self.mu[..., 0] if self.on_line else self.mu

    @property
    def cov(self) -> Array:
        """Covariance in the constructor's form: [...] on the line, [..., d], or [..., d, d]."""
        if self.basis is None:
            return self.spectrum[..., 0] if self.on_line else self.spectrum
        return self.matrix

    @property
    def matrix(self) -> Array:
        """Covariance as matrices [..., d, d], in every form."""
        return self.power(1.0)

    def power(self, exponent: float) -> Array:
        """Compute cov^exponent, [..., d, d]; directions without variance stay without."""
        with np.errstate(divide="ignore"):
            values = np.where(self.spectrum > 0, self.spectrum**exponent, 0.0)
        U = np.eye(self.d) if self.basis is None else self.basis
        return np.asarray((U * values[..., None, :]) @ U.T)

    @property
    def variance(self) -> Array:
        """Variances of the coordinates, [..., d], or [...] on the line."""
        if self.basis is None:
            return self.cov
        return np.asarray(self.spectrum @ (self.basis**2).T)

    def to_eigen(self, x: Array) -> Array:
        """Convert `x` [..., d] to coordinates in the eigenbasis."""
        return x if self.basis is None else np.asarray(x @ self.basis)

    def from_eigen(self, x: Array) -> Array:
        """Convert coordinates in the eigenbasis [..., d] to the original coordinates."""
        return x if self.basis is None else np.asarray(x @ self.basis.T)

    def sample(self, n: int, seed: int | np.random.Generator = 0) -> Array:
        """Draw `n` points, [n, d] or [n] on the line; EtudeError for a batch of laws."""
        self.single("sample")
        z = np.random.default_rng(seed).standard_normal((n, self.d))
        x = self.mu + self.from_eigen(z * np.sqrt(self.spectrum))
        return x[:, 0] if self.on_line else x

    def log_density(self, x: Numbers) -> Array:
        """Compute the log density at `x` [..., d], or [...] on the line."""
        self.single("log_density")
        x = np.asarray(x, dtype=np.float64)
        z = self.to_eigen((x[..., None] if self.on_line else x) - self.mu)
        return np.asarray(-0.5 * np.sum(z**2 / self.spectrum + np.log(2.0 * np.pi * self.spectrum), axis=-1))

    def single(self, what: str) -> None:
        """Raise EtudeError for a batch of laws; the error calls the caller `what`."""
        if self.batch:
            raise EtudeError(f"{what} takes one Gaussian, got a batch of shape {self.batch}: index the batch first.")

    def __getitem__(self, index: Any) -> Gaussian:
        """Select one law (or a smaller batch) from a batch."""
        if not self.batch:
            raise EtudeError("this Gaussian is a single law, not a batch: there is nothing to index.")
        index = index if isinstance(index, tuple) else (index,)
        at = index if Ellipsis in index else (*index, Ellipsis)
        return Gaussian.from_spectrum(self.mu[at], self.spectrum[at], self)

    def __repr__(self) -> str:
        if self.on_line and not self.batch:
            return f"Gaussian(mean={float(self.mean):.6g}, cov={float(self.cov):.6g})"
        return f"Gaussian(d={self.d}, batch={self.batch})"


def _is_covariance(matrix: Array) -> bool:
    return bool(np.allclose(matrix, matrix.T) and np.linalg.eigvalsh(matrix).min() > 0)


class GaussianMixture:
    """The law `sum_k w_k N(m_k, C_k)`.

    `weights` is [K]; `means` is [K] (on the line) or [K, d]; `covs` is one variance for all, [K],
    [K, d] or [K, d, d].

    Raises:
        EtudeError: the shapes do not fit, the weights do not sum to 1, a component has no variance
            in some direction, or K = d and `covs` [K, d] could also be one shared covariance
            matrix.
    """

    weights: Array
    components: list[Gaussian]

    def __init__(self, weights: Numbers, means: Numbers, covs: Numbers):
        w, m, c = array(weights, "the weights"), array(means, "the means"), array(covs, "the covariances")
        if w.ndim != 1 or m.ndim not in (1, 2) or m.shape[0] != w.size or (c.ndim and c.shape[0] != w.size):
            raise EtudeError(
                f"a mixture's weights {w.shape}, means {m.shape} and covariances {c.shape} do not fit: pass [K] weights, "
                "[K] or [K, d] means, and one number, [K], [K, d] or [K, d, d] for the covariances."
            )
        if np.any(w < 0) or not np.isclose(w.sum(), 1.0, rtol=0, atol=1e-6):
            raise EtudeError(f"the weights sum to {w.sum():g}: a mixture needs weights of zero or more that sum to 1.")
        if m.ndim == 2 and c.shape == (w.size, w.size) == m.shape and w.size > 1 and _is_covariance(c):
            raise EtudeError(
                f"covariances of shape {c.shape} for {w.size} components in {w.size} dimensions may be one shared matrix or "
                "one row of variances each: pass [K, d, d], one matrix per component."
            )
        c = np.broadcast_to(c, (w.size,)) if c.ndim == 0 else c
        keep = w > 0
        parts = [Gaussian(mk, ck) for mk, ck in zip(m[keep], c[keep], strict=True)]
        if any(part.spectrum.min() <= 0 for part in parts):
            raise EtudeError(
                "a component has a variance of 0: give every component of a mixture a positive covariance."
            )
        self.weights, self.components = w[keep] / w.sum(), parts

    @classmethod
    def of(cls, weights: Numbers, components: Sequence[Gaussian]) -> GaussianMixture:
        """Make the mixture of these Gaussians."""
        law = GaussianMixture.__new__(GaussianMixture)
        law.weights, law.components = array(weights, "the weights"), list(components)
        return law

    @property
    def d(self) -> int:
        """Number of dimensions."""
        return self.components[0].d

    @property
    def on_line(self) -> bool:
        """Whether means and variances are numbers."""
        return self.components[0].on_line

    @property
    def means(self) -> Array:
        """Means of the components, [K, d]."""
        return np.stack([part.mu for part in self.components])

    @property
    def mu(self) -> Array:
        """Mean of the mixture, [d]."""
        return np.asarray(self.weights @ self.means)

    @property
    def matrix(self) -> Array:
        """Covariance of the mixture, [d, d]."""
        shift = self.means - self.mu
        within = sum(w * part.matrix for w, part in zip(self.weights, self.components, strict=True))
        return np.asarray(within + (shift * self.weights[:, None]).T @ shift)

    @property
    def mean(self) -> Array:
        """Mean of the mixture, [d], or a number on the line."""
        return self.mu[0] if self.on_line else self.mu

    @property
    def cov(self) -> Array:
        """Covariance of the mixture, [d, d], or a number on the line."""
        return self.matrix[0, 0] if self.on_line else self.matrix

    def sample(self, n: int, seed: int | np.random.Generator = 0) -> Array:
        """Draw `n` points, [n, d] or [n] on the line."""
        rng = np.random.default_rng(seed)
        label = rng.choice(self.weights.size, size=n, p=self.weights)
        x = np.empty((n, self.d))
        for k, part in enumerate(self.components):
            rows = label == k
            x[rows] = part.mu + part.from_eigen(rng.standard_normal((int(rows.sum()), self.d)) * np.sqrt(part.spectrum))
        return x[:, 0] if self.on_line else x

    def log_parts(self, y: Array, q: npt.ArrayLike = 0.0) -> Array:
        """Compute log w_k N(y; m_k, C_k + q I), [..., K], at points `y` [..., d]."""
        out = []
        for w, part in zip(self.weights, self.components, strict=True):
            z, k = part.to_eigen(y - part.mu), part.spectrum + np.asarray(q)
            out.append(np.log(w) - 0.5 * np.sum(z**2 / k + np.log(2.0 * np.pi * k), axis=-1))
        return np.stack(out, axis=-1)

    def log_density(self, x: Numbers) -> Array:
        """Compute the log density at `x` [..., d], or [...] on the line."""
        x = np.asarray(x, dtype=np.float64)
        return np.asarray(logsumexp(self.log_parts(x[..., None] if self.on_line else x), axis=-1))

    def posterior_mean(self, y: Array, q: float) -> Array:
        """Compute the denoiser `E[x0 | x0 + sqrt(q) eps = y]` of this target at points `y` [n, d]."""
        logs = self.log_parts(y, q)
        weight = np.exp(logs - logsumexp(logs, axis=-1, keepdims=True))
        out = np.zeros_like(y)
        for k, part in enumerate(self.components):
            gain = part.spectrum / (part.spectrum + q)
            out += weight[:, k : k + 1] * (part.mu + part.from_eigen(gain * part.to_eigen(y - part.mu)))
        return out

    def __repr__(self) -> str:
        return f"GaussianMixture(components={self.weights.size}, d={self.d})"
