"""From rewards to weights: advantages, objectives, draws, optimiser steps."""

from __future__ import annotations
