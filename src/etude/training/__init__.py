"""Fine-tuning: the loop (`trainer`), its evaluation, and the files that a run leaves.

The formulas are elsewhere: `etude.sampling.rollout` draws images, and `etude.learning.advantages`
and `etude.learning.objectives` give the loss.
"""
