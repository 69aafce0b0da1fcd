"""Target laws, a Gaussian and a mixture of Gaussians, and distances between Gaussians."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.special import logsumexp

from etude.errors import EtudeError
from etude.theory.arrays import Array, Numbers, array, plain


class Gaussian:
    """The law N(mean, cov).

    `mean` is a number or [d]; `cov` is a variance, variances [d], or a symmetric matrix [d, d]. Two
    numbers make a law on the line: `mean` and `cov` are numbers and samples have shape [n]. Batches
    of laws have `mean` [..., d] and `cov` [..., d] or [..., d, d]. EtudeError if the shapes do not
    fit, or `cov` is not symmetric or has a negative eigenvalue.
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
            raise EtudeError(f"the mean has {mean.size} entries but the covariance is {cov.shape}: make them agree.")
        self.mu = np.broadcast_to(mean, (d,)).copy()
        if cov.ndim < 2:
            self.basis, spectrum = None, np.broadcast_to(cov, (d,)).copy()
        elif np.abs(cov - cov.T).max() > 1e-9 * np.abs(cov).max():
            raise EtudeError("the covariance matrix is not symmetric: pass (C + C.T) / 2 if that is what you mean.")
        else:
            spectrum, self.basis = np.linalg.eigh(0.5 * (cov + cov.T))
        if spectrum.min() < -1e-10 * max(float(spectrum.max()), 1e-300):
            raise EtudeError(f"the covariance has the eigenvalue {spectrum.min():g}: a covariance has none below zero.")
        self.spectrum = np.maximum(spectrum, 0.0)

    @classmethod
    def from_spectrum(cls, mu: Array, spectrum: Array, like: Gaussian) -> Gaussian:
        """Make the law of mean `mu` and eigenvalues `spectrum`, [..., d], in `like`'s basis."""
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

    @property
    def axes(self) -> Array:
        """Eigenvectors of the covariance as columns, [d, d]."""
        return np.eye(self.d) if self.basis is None else self.basis

    def power(self, exponent: float) -> Array:
        """Compute cov^exponent, [..., d, d]; directions without variance stay without."""
        with np.errstate(divide="ignore"):
            values = np.where(self.spectrum > 0, self.spectrum**exponent, 0.0)
        return np.asarray((self.axes * values[..., None, :]) @ self.axes.T)

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


class GaussianMixture:
    """The law `sum_k w_k N(m_k, C_k)`.

    `weights` is [K]; `means` is [K] (on the line) or [K, d]; `covs` is one variance for all, [K],
    [K, d] or [K, d, d]. EtudeError if the shapes do not fit, the weights do not sum to 1, a
    component has no variance in some direction, or `covs` [K, d] with K = d could be one shared
    covariance matrix.
    """

    weights: Array  # [K]
    components: list[Gaussian]
    means: Array  # of the components, [K, d]
    mu: Array  # mean of the mixture, [d]
    on_line: bool

    def __init__(self, weights: Numbers, means: Numbers, covs: Numbers):
        w, m, c = array(weights, "the weights"), array(means, "the means"), array(covs, "the covariances")
        if w.ndim != 1 or m.ndim not in (1, 2) or m.shape[0] != w.size or (c.ndim and c.shape[0] != w.size):
            raise EtudeError(
                f"a mixture's weights {w.shape}, means {m.shape} and covariances {c.shape} do not fit: pass [K] weights, "
                "[K] or [K, d] means, and one number, [K], [K, d] or [K, d, d] for the covariances."
            )
        if np.any(w < 0) or not np.isclose(w.sum(), 1.0, rtol=0, atol=1e-6):
            raise EtudeError(f"the weights sum to {w.sum():g}: a mixture needs weights of zero or more that sum to 1.")
        ambiguous = m.ndim == 2 and c.shape == (w.size, w.size) == m.shape and w.size > 1
        if ambiguous and np.allclose(c, c.T) and np.linalg.eigvalsh(c).min() > 0:
            raise EtudeError(
                f"covariances of shape {c.shape} for {w.size} components in {w.size} dimensions may be one shared matrix or "
                "one row of variances each: pass [K, d, d], one matrix per component."
            )
        c = np.broadcast_to(c, (w.size,)) if c.ndim == 0 else c
        keep = w > 0
        parts = [Gaussian(mk, ck) for mk, ck in zip(m[keep], c[keep], strict=True)]
        if any(part.spectrum.min() <= 0 for part in parts):
            raise EtudeError("a component has a variance of 0: give every component a positive covariance.")
        self.compose(w[keep] / w.sum(), parts)

    def compose(self, weights: Array, components: list[Gaussian]) -> None:
        """Take these components as they are."""
        self.weights, self.components = weights, components
        self.means = np.stack([part.mu for part in components])
        self.mu = np.asarray(weights @ self.means)
        self.d, self.on_line = components[0].d, components[0].on_line

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
        """Compute the denoiser `E[x0 | x0 + sqrt(q) eps = y]` at points `y` [n, d]."""
        logs = self.log_parts(y, q)
        weight = np.exp(logs - logsumexp(logs, axis=-1, keepdims=True))
        out = np.zeros_like(y)
        for k, part in enumerate(self.components):
            gain = part.spectrum / (part.spectrum + q)
            out += weight[:, k : k + 1] * (part.mu + part.from_eigen(gain * part.to_eigen(y - part.mu)))
        return out

    def __repr__(self) -> str:
        return f"GaussianMixture(components={self.weights.size}, d={self.d})"


Law: TypeAlias = Gaussian | GaussianMixture


def w2(p: Gaussian, q: Gaussian) -> Any:
    """Compute the Wasserstein-2 distance; a number, or an array for batches of laws.

    `W2^2 = |m_p - m_q|^2 + min_R |C_p^(1/2) - C_q^(1/2) R|_F^2` over orthogonal R, at the polar
    factor of C_q^(1/2) C_p^(1/2). Nothing cancels. EtudeError if the dimensions differ.
    """
    _check(p, q)
    squared: Array = np.sum((p.mu - q.mu) ** 2, axis=-1)
    if p.basis is q.basis:
        squared = squared + np.sum((np.sqrt(p.spectrum) - np.sqrt(q.spectrum)) ** 2, axis=-1)
    else:
        root_p, root_q = p.power(0.5), q.power(0.5)
        left, _, right = np.linalg.svd(root_q @ root_p)
        squared = squared + np.sum((root_p - root_q @ (left @ right)) ** 2, axis=(-2, -1))
    return plain(np.sqrt(squared))


def kl(p: Gaussian, q: Gaussian) -> Any:
    """Compute the Kullback-Leibler divergence; a number, or an array for batches of laws:

        KL(p || q) = 1/2 [tr(C_q^-1 C_p) - d - log det(C_q^-1 C_p) + |m_p - m_q|^2_(C_q^-1)]

    It is infinite where one law has no variance in a direction and the other has, or the means
    differ in a direction without variance. EtudeError if the dimensions differ.
    """
    _check(p, q)
    if p.basis is q.basis:
        ratio = _ratio(p.spectrum, q.spectrum)
        distance = _ratio(p.to_eigen(p.mu - q.mu) ** 2, q.spectrum, empty=0.0)
    elif np.any(q.spectrum <= 0):
        return plain(np.full(np.broadcast_shapes(p.batch, q.batch), np.inf))
    else:
        whiten = q.power(-0.5)
        ratio = np.asarray(np.linalg.eigvalsh(whiten @ p.matrix @ whiten), dtype=np.float64)
        distance = np.einsum("...ij,...j->...i", whiten, p.mu - q.mu) ** 2
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
        raise EtudeError(f"the laws have {p.d} and {q.d} dimensions, so they have no distance: give both the same.")


def gaussian(target: Law, what: str) -> Gaussian:
    """Return the target if it is one Gaussian; an EtudeError for any other names `what`."""
    if isinstance(target, Gaussian):
        target.single(what)
        return target
    if isinstance(target, GaussianMixture):
        raise EtudeError(f"{what} is closed form for a Gaussian only, got a mixture: use reward_gap for mixtures.")
    raise EtudeError(f"{what} got a {type(target).__name__}, which is not a law: pass Gaussian(mean, cov).")
