"""`python -m stackrace` is the command `stackrace`."""

from stackrace.harness.cli import main

main()
