"""The sampler: paths, kernels, plans, keyed noise, the rollout and its replay."""
