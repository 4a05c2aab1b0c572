"""`python -m cepo` is `cepo`."""

from cepo.cli.app import main

main()
