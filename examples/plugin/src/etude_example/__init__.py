"""One extension of each kind for etude."""
