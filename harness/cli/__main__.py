"""`python -m klab.harness.cli`: the command klab."""

from klab.harness.cli.main import main

main()
