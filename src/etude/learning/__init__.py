"""What turns rewards into weights: advantages, objectives, draws, optimiser steps."""

from __future__ import annotations
