"""AutoRound (200 iterations, its default) on a checkpoint; run by `quality.py` in an environment that has it."""

import time

import measure
import torch
from auto_round import AutoRound
from auto_round.schemes import QuantizationScheme

BATCH = 8


def main():
    args = measure.arguments(__doc__)
    integer = measure.integer_format(args.format)
    if integer is None:
        raise SystemExit(f"this script has no {args.format}")
    bits, group, symmetric = integer
    tokenizer, model, original = measure.tokenizer_of(args.model), measure.load(args.model), measure.load(args.model)
    rows = torch.tensor(measure.calibration(args, tokenizer)).split(BATCH)
    rounder = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme=QuantizationScheme(bits=bits, group_size=group, sym=symmetric, act_bits=16),
        dataset=list(rows),
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        batch_size=BATCH,
        device_map="cpu",
    )
    begin, cpu = time.perf_counter(), time.process_time()
    quantized, _ = rounder.quantize()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    texts = measure.figures(quantized, original, args, tokenizer)
    rounder.save_quantized(str(args.out), format="auto_round")
    found = measure.bits_per_weight(args.model, args.out)
    measure.report(seconds=seconds, cpu_seconds=cpu, bits_per_weight=found, texts=texts)


if __name__ == "__main__":
    main()
