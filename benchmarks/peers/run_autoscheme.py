"""AutoRound's AutoScheme: the bits that it gives to each linear, as a plan that `alphaquant` carries out.

    python benchmarks/peers/run_autoscheme.py MODEL --bits 3 --calib train.txt --nsamples 16 --seqlen 256 -o plan.json

Bits count scales, as `alphaquant` does (16 bits a group). AutoScheme scores every option by one forward and backward
pass each over the same windows that `alphaquant` draws; its own defaults are 16 windows of 256 tokens.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import measure
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme

GROUP = 64
BITS = (2, 3, 4, 8)  # AutoRound has no six-bit integers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=float, required=True)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = measure.tokenizer_of(args.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "windows.jsonl"
        # it cuts every text to so many tokens and drops shorter ones: a few more, should some not survive decoding
        window = argparse.Namespace(**{**vars(args), "seqlen": args.seqlen + 16})
        rows = measure.calibration(window, tokenizer)
        file.write_text("".join(json.dumps({"text": tokenizer.decode(row)}) + "\n" for row in rows))
        options = [QuantizationScheme(bits=bits, group_size=GROUP, sym=True, act_bits=16) for bits in BITS]
        search = AutoScheme(
            avg_bits=args.bits - 16 / GROUP,
            options=options,
            ignore_scale_zp_bits=True,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            dataset=str(file),
            device_map="cpu",
        )
        begin = time.process_time()
        rounder = AutoRound(str(args.model), scheme=search, iters=0, dataset=str(file), device_map="cpu")
        rounder.configure_layer_config()
    found = {name: config["bits"] for name, config in rounder.layer_config.items() if config["bits"] < 16}
    rules = [{"pattern": name, "wq": f"int{bits}", "group_size": GROUP} for name, bits in found.items()]
    args.output.write_text(json.dumps({"default": {"wq": "bf16"}, "overrides": rules}, indent=1))
    measure.report(seconds=round(time.process_time() - begin, 1), modules=len(found))


if __name__ == "__main__":
    main()
