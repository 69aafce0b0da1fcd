"""From rewards to weights: advantages, objectives, draws, optimiser steps."""
