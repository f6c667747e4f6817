#!/usr/bin/env bash
# GPTQ in mixed precision from a plan, into one .pt file:
#   ./run_gptq_example.sh [MODEL [options of `alphaquant quantize`]]
# MODEL is a checkpoint directory or a hub id. The text is WikiText-2; without network add: --calib bundled
set -euo pipefail
model=${1:-allenai/OLMoE-1B-7B-0924}
here=$(dirname "$0")
python "$here/scripts/run_gptq.py" --model "$model" --config "$here/configs/gptq_olmoe_mixed.json" --nsamples 128 \
  --save quantized.pt "${@:2}"
