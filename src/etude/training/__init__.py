"""Fine-tuning: the loop (`trainer`), its evaluation, and the files that a run leaves.

The formulas are elsewhere: `etude.sampling` draws images, and `etude.learning` gives the loss.
"""
