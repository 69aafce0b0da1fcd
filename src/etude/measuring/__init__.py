"""The reward gap and the improvement, paired, with their intervals."""
