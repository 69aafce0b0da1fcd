"""The way from rewards to weights: advantages, objectives, draws, optimiser steps."""
