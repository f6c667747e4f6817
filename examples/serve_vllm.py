"""Quantize a model for vLLM, and let vLLM generate with it; on the command line: `vllm serve OUT`.

It needs `pip install vllm` beside alphaquant, and a GPU, or vLLM's build for CPUs.

    python examples/serve_vllm.py --model allenai/OLMoE-1B-7B-0924 --out olmoe-int4
"""

import argparse
from importlib.resources import files
from pathlib import Path

from vllm import LLM, SamplingParams

import alphaquant
from alphaquant.engines import profile_of

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(files("alphaquant") / "data" / "demo-model"), help="directory or hub id")
parser.add_argument("--scheme", default="int4:g64")
parser.add_argument("--calib", default="bundled", help="wikitext2, c4, bundled, or a file")
parser.add_argument("--nsamples", type=int, default=64)
parser.add_argument("--seqlen", type=int, default=256)
parser.add_argument("--tp", type=int, default=1, help="GPUs that share the model")
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--prompt", default="The state of the Union is")
args = parser.parse_args()

alphaquant.quantize(
    args.model,
    args.out,
    args.scheme,
    calibration=alphaquant.Calibration(args.calib, num_samples=args.nsamples, seqlen=args.seqlen),
    # an error lists what vLLM would not take, before anything is computed
    serving=alphaquant.Serving(profile_of("vllm"), tp=args.tp),
)
llm = LLM(str(args.out), tensor_parallel_size=args.tp, max_model_len=512, enforce_eager=True)
(answer,) = llm.generate([args.prompt], SamplingParams(temperature=0.0, max_tokens=24))
print(args.prompt + answer.outputs[0].text)
