"""Which eta to train with and which sampler to deploy, from pilot runs."""
