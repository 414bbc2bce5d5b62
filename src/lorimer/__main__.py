"""`python -m lorimer` is the same as `lorimer`."""

from lorimer.cli.app import main

main()
