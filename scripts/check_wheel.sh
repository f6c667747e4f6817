#!/usr/bin/env bash
# What a user of the wheel sees: build it, install it into an empty environment outside the repository, run the demo,
# quantize a checkpoint. Everything is made in a temporary directory that goes away again.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${1:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --outdir "$work/dist" . > "$work/build.log" 2>&1 || { tail -30 "$work/build.log"; exit 1; }
"$python" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip --disable-pip-version-check --quiet install -c "$root/constraints.txt")
"${pip[@]}" torch # first and pinned, or "any torch" brings several GB of CUDA
"${pip[@]}" "$work"/dist/*.whl

cd "$work"
export PATH="$work/venv/bin:$PATH" PYTHONPATH=
alphaquant demo -o demo --quiet > demo.txt
grep -q '^GPTQ ' demo.txt
test -s demo/alphaquant/report.html
model=$(python -c 'from importlib.resources import files; print(files("alphaquant") / "data" / "demo-model")')
case $model in "$work"/*) ;; *) echo "the package was imported from $model"; exit 1 ;; esac
alphaquant quantize "$model" --scheme int4:g64 --calib bundled --nsamples 8 --seqlen 64 -o own --quiet > own.txt
test -s own/config.json
python -c 'import alphaquant, torch; print(alphaquant.load("own").generate(torch.tensor([[5, 6, 7]]), 4).shape)'
ls -l "$work"/dist | awk 'NR > 1 { print $NF, $5, "bytes" }'
