"""llm-compressor by a script of ../shared/peers, and behind its result the seconds of Hessians and solver alone.

    LC/bin/python benchmarks/peers/time_llmcompressor.py SCRIPT MODEL …

Scales by its observer are not counted; ours, which are searched, are.
"""

import json
import runpy
import sys
import time
from pathlib import Path

from llmcompressor.modifiers.gptq import GPTQModifier

seconds = dict.fromkeys(("calibrate_module", "compress_modules"), 0.0)


def timed(name):
    """A method that counts its time."""
    method = getattr(GPTQModifier, name)

    def run(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - begin

    return run


for name in seconds:
    setattr(GPTQModifier, name, timed(name))
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
print("SOLVER", json.dumps({"hessian": seconds["calibrate_module"], "solve": seconds["compress_modules"]}))
