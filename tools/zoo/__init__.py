"""Training of the embedded models, and of the heads of the `alignment` reward, on emoji.

`python -m tools.zoo.pretrain --help` is the command; docs/embedded-models.md has its results.
"""
