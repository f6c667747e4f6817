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
if "$python" -c "import humming" 2> /dev/null; then # pip install humming-kernels
  "$python" benchmarks/gpu_humming.py | tee "$out/humming.json"
else
  echo "no humming-kernels: what it computes of our checkpoints is not held against them" >&2
fi
