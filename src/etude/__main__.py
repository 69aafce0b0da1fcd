"""`python -m etude` is `etude`."""

from etude.cli.app import main

main()
