"""GPTQModel on a checkpoint, with its defaults; run by `quality.py` in an environment that has it."""

import fnmatch
import time

import measure
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def main():
    args = measure.arguments(__doc__)
    integer = measure.integer_format(args.format)
    if integer is None:
        raise SystemExit(f"GPTQModel's GPTQ has no {args.format}")
    bits, group, symmetric = integer
    tokenizer = measure.tokenizer_of(args.model)
    mask = torch.ones(1, args.seqlen, dtype=torch.long)
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": mask} for row in measure.calibration(args, tokenizer)]
    skipped = None if args.only == "*" else {f"-:(?!{fnmatch.translate(args.only)})": {}}
    config = QuantizeConfig(bits=bits, group_size=group, sym=symmetric, desc_act=False, dynamic=skipped)
    model = GPTQModel.load(str(args.model), config, device="cpu")
    begin = time.perf_counter()
    model.quantize(rows, batch_size=1)
    seconds = time.perf_counter() - begin
    model.save(str(args.out))
    quantized = GPTQModel.load(str(args.out), device="cpu", backend=BACKEND.TORCH).model
    texts = measure.figures(quantized, measure.load(args.model), args, tokenizer)
    measure.report(seconds=seconds, bits_per_weight=measure.bits_per_weight(args.model, args.out), texts=texts)


if __name__ == "__main__":
    main()
