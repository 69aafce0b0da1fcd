"""Fine-tuning: the loop (`trainer`), what an iteration draws and is judged by, and what a run keeps on disk.

The formulas are not here: `etude.rollout` samples and replays, `etude.advantages` and `etude.objectives` are the loss.
"""
