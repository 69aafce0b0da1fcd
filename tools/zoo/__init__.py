"""How the embedded models, and the heads of the `alignment` reward, were trained on emoji.

`python -m tools.zoo.pretrain --help` is the command; docs/embedded-models.md says what it gave.
"""
