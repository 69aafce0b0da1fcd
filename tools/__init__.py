"""Scripts of the repository that the package does not need: how the embedded models were trained, and the comparison of bits."""
