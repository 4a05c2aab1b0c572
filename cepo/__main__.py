"""`python -m cepo` is `cepo`."""

from cepo.cli import main

main()
