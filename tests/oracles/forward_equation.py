"""The forward equation dX = f X dt + g dB of each path, with f = a'/a and g^2 = a^2 d(s^2/a^2)/dt."""

from __future__ import annotations

import math

from etude.theory import VE, VP, ContinuousPath, RectifiedFlow


def drift(path: ContinuousPath, t: float) -> float:
    if isinstance(path, VE):
        return 0.0
    if isinstance(path, VP):
        return -0.5 * float(path.beta(t))
    return -_speed(path, t) / float(path.a(t))


def squared_diffusion(path: ContinuousPath, t: float) -> float:
    if isinstance(path, VP):
        return float(path.beta(t))
    if not isinstance(path, VE):
        return 2.0 * float(path.s(t)) * _speed(path, t) / float(path.a(t))
    if path.sigma == "geometric":
        growth = 2.0 * math.log(path.sigma_max / path.sigma_min) / float(path.T)
        return float(path.sigma_min) ** 2 * growth * math.exp(growth * t)
    return 2.0 * t if path.sigma == "t" else 1.0


def _speed(path: RectifiedFlow, t: float) -> float:
    return path.shift / (1.0 + (path.shift - 1.0) * t) ** 2
