"""Fine-tuning: the loop (`trainer`), what an iteration draws and is judged by, and what a run keeps on disk.

The formulas are not here: `etude.sampling.rollout` samples and replays, `etude.learning.advantages` and `etude.learning.objectives` are the loss.
"""
