"""The command with the model as an option: everything but --model goes to `alphaquant quantize` as it is.

python scripts/run_gptq.py --model MODEL --config configs/gptq_olmoe_mixed.json --nsamples 128 --save quantized.pt
"""

from __future__ import annotations

import argparse
import sys

from alphaquant.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        usage="%(prog)s --model MODEL [options of `alphaquant quantize`]", allow_abbrev=False, add_help=False
    )
    parser.add_argument("--model")
    given, options = parser.parse_known_args()
    sys.argv = ["alphaquant", "quantize", *([] if given.model is None else [given.model]), *options]
    main()
