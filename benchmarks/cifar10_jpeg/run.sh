#!/usr/bin/env bash
# One stage of the cifar10-jpeg evidence in one command: benchmarks/cifar10_jpeg/run.sh STAGE [--limit SECONDS] ...
# The stages and their options: benchmarks/cifar10_jpeg/run.sh --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The checkout that this file is in, installed or not.
export PYTHONPATH="$(dirname "$(dirname "$here")")${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$here/run_stage.py" "$@"
