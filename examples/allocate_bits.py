"""Find the plan for a budget of bits, look at what it gives to whom, and hold it against one format everywhere.

On the command line: `alphaquant quantize MODEL --bits 3.2 -o OUT`, and `alphaquant plan MODEL --bits 3.2 -o plan.json`
for the plan alone.

    python examples/allocate_bits.py
    python examples/allocate_bits.py --model allenai/OLMoE-1B-7B-0924 --bits 3.5 --engine vllm --calib wikitext2
"""

import argparse
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import alphaquant

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(files("alphaquant") / "data" / "demo-model"), help="directory or hub id")
parser.add_argument("--bits", type=float, default=3.2, help="average stored bits a weight, scales counted")
parser.add_argument("--formats", default="int2:g64,int3:g64,int4:g64,int8:g64", help="to choose from")
parser.add_argument("--engine", help="vllm, transformers or any: what is found, it takes")
parser.add_argument("--calib", default="bundled", help="wikitext2, c4, bundled, or a file")
parser.add_argument("--nsamples", type=int, default=32)
parser.add_argument("--seqlen", type=int, default=256)
args = parser.parse_args()

calibration = alphaquant.Calibration(args.calib, num_samples=args.nsamples, seqlen=args.seqlen)
with TemporaryDirectory() as scratch:
    folder = Path(scratch)
    # the costs of all modules are measured once; every other budget of this model reads them
    search = alphaquant.Search(formats=args.formats, table=folder / "costs.json", validate=0)
    tight = alphaquant.plan(args.model, bits=args.bits, search=search, calibration=calibration, serving=args.engine)
    roomy = alphaquant.plan(args.model, bits=args.bits + 1, search=search, calibration=calibration, serving=args.engine)
    for found in (tight, roomy):
        proposal = found.proposal
        assert proposal is not None
        bits, uniform = proposal["bits_per_weight"], proposal["uniform"]["predicted_cost"]
        print(f"{bits:.2f} bits a weight: {proposal['bytes']:,} bytes, predicted KL {proposal['predicted_cost']:.4f},")
        print(f"  of a plan that spends the same bits without looking {uniform:.4f}")
    for kind in tight.sizes:
        print(f"  {kind.kind:>10} {kind.scheme:<10} {kind.modules:>5} modules, {kind.weights:>10,} weights")

    alphaquant.quantize(args.model, folder / "out", tight.plan, calibration=calibration, serving=args.engine)
    quality = alphaquant.evaluate(folder / "out", data=args.calib, seqlen=args.seqlen, windows=20, against=args.model)
    agreement = quality.agreement
    assert agreement is not None
    print(f"perplexity {quality.perplexity:.3f}, original {agreement.original_perplexity:.3f}, KL {agreement.kl:.4f}")
