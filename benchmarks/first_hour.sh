#!/bin/sh
# The first hour on a GPU: every value, then the kernels, the engine and the lazy world on SmolLM2, in calls of at most
# ten minutes. `benchmarks/first_hour.sh --help` says more; PYTHON names an interpreter other than .venv's or python3.
root=$(cd "$(dirname "$0")/.." && pwd) || exit
if [ -z "$PYTHON" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -m cepo.benchmarks.first_hour "$@"
