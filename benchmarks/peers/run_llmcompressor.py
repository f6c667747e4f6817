"""llm-compressor's GPTQ on a checkpoint, with its defaults; run by `quality.py` in an environment that has it."""

import fnmatch
import time

import measure
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

IGNORED = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$", "re:.*shared_expert_gate$"]


def scheme_of(name, targets):
    integer = measure.integer_format(name)
    if integer is None:
        return preset_name_to_scheme({"mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}[name], targets)
    bits, group, symmetric = integer
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group)
    return QuantizationScheme(targets=targets, weights=weights)


def main():
    args = measure.arguments(__doc__)
    tokenizer, model, original = measure.tokenizer_of(args.model), measure.load(args.model), measure.load(args.model)
    rows = measure.calibration(args, tokenizer)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * args.seqlen] * len(rows)})
    targets = ["Linear"] if args.only == "*" else ["re:" + fnmatch.translate(args.only)]
    modifier = GPTQModifier(ignore=IGNORED, config_groups={"group_0": scheme_of(args.format, targets)})
    begin = time.perf_counter()
    oneshot(
        model=model, dataset=data, recipe=modifier, max_seq_length=args.seqlen, num_calibration_samples=args.nsamples
    )
    seconds = time.perf_counter() - begin
    texts = measure.figures(model, original, args, tokenizer)
    model.save_pretrained(args.out, save_compressed=True)
    measure.report(seconds=seconds, bits_per_weight=measure.bits_per_weight(args.model, args.out), texts=texts)


if __name__ == "__main__":
    main()
