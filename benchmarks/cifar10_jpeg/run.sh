#!/usr/bin/env bash
# One stage of the cifar10-jpeg evidence in one command: benchmarks/cifar10_jpeg/run.sh STAGE [--limit SECONDS] ...
# The stages and their options: benchmarks/cifar10_jpeg/run.sh --help
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/run_stage.py" "$@"
