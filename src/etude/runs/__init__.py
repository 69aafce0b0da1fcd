"""The directory of a run: its layout, its checkpoints, and how it is read."""
