#!/usr/bin/env bash
# The benchmarks on a GPU, in stages of a few minutes each; rows go to the file that is given.
#
#   benchmarks/on_gpu.sh tests   rows.jsonl    # the tests marked gpu, before anything is believed
#   benchmarks/on_gpu.sh network rows.jsonl    # FloT-B and U-Net-B at 32x32: fp32 and bf16, eager and compiled, share of the matmul rate
#   benchmarks/on_gpu.sh train   rows.jsonl    # steps of every MeanFlow line beside flow matching and the textbook; the loop beside a bare one
#   benchmarks/on_gpu.sh sample  rows.jsonl    # four steps beside bare calls, diffusers and torchdiffeq; CUDA graphs, compiled, bf16
#   benchmarks/on_gpu.sh data    rows.jsonl    # loader, metrics
#
# `python benchmarks/speed.py table rows.jsonl` prints the table.
set -euo pipefail
stage=${1:?which stage: tests, network, train, sample or data}
rows=$(realpath -m "${2:?the file that takes the rows}")
cd "$(dirname "$0")/.."
bench() { "${PYTHON:-python3}" -m fewstep bench "$@" --ledger "$rows"; }
image=(--shape 3,32,32)

case $stage in
  tests)
    "${PYTHON:-python3}" -m pytest -m gpu -p no:cacheprovider
    ;;
  network)
    for precision in fp32 bf16; do
      for compile in "" --compile; do
        bench network flot-base unet-base "${image[@]}" --batch-size 128 --precision $precision $compile
      done
    done
    ;;
  train)
    for precision in fp32 bf16; do
      bench objectives meanflow --size flot-base "${image[@]}" --batch-size 128 --precision $precision --compile
    done
    bench train digits-teacher --step-ms 20 --repeats 100
    ;;
  sample)
    for size in flot-base unet-base; do
      bench sample --network $size "${image[@]}" --call-ms 5 --precision bf16 --compile
    done
    bench sample --network flot-tiny --call-ms 5
    ;;
  data)
    bench loader
    bench metrics frechet neighbours kernel inception
    ;;
  *)
    echo "no stage '$stage': tests, network, train, sample or data" >&2
    exit 2
    ;;
esac
