#!/usr/bin/env bash
# Everything that only a GPU can show, in one call of under ten minutes: PYTHON=... benchmarks/gpu_all.sh [OUT]
# Needs PyTorch with CUDA, Triton, and this package's other dependencies; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src"
python=${PYTHON:-python3}
out=${1:-gpu-results}
mkdir -p "$out"
"$python" benchmarks/gpu_kernels.py | tee "$out/kernels.json"
"$python" benchmarks/speed.py --device cuda --shapes olmoe qwen --experts 64 --tokens 65536 | tee "$out/speed.json"
"$python" benchmarks/gpu_run.py --scratch "${TMPDIR:-/tmp}" | tee "$out/run.json"
