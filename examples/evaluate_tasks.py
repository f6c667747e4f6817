"""Measure a quantized model and its original on a task of lm-eval, here a small one that needs no network.

On the command line: `alphaquant eval OUT --tasks arc_easy,hellaswag`. It needs `pip install 'alphaquant-moe[eval]'`.

    python examples/evaluate_tasks.py
    python examples/evaluate_tasks.py --model allenai/OLMoE-1B-7B-0924 --tasks arc_easy,hellaswag --limit 200
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import alphaquant

# Which of two words goes on? Sentences of the text that the bundled model was trained on the like of.
QUESTIONS = [
    ("The Congress of the United", "States", "table"),
    ("the House of", "Representatives", "the"),
    ("peace and", "prosperity", "of"),
    ("the people of this", "country", "and"),
    ("the President of the United", "States", "of"),
    ("the end of the fiscal", "year", "people"),
    ("the Secretary of the", "Treasury", "is"),
    ("the American", "people", "which"),
]
TASK = """
task: next_word
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
dataset_path: json
dataset_kwargs:
  data_files:
    test: FILE
test_split: test
"""

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(files("alphaquant") / "data" / "demo-model"), help="directory or hub id")
parser.add_argument("--scheme", default="int3:g64")
parser.add_argument("--tasks", default="next_word", help="names, with commas between them")
parser.add_argument("--limit", type=int, help="at most so many examples of each task")
parser.add_argument("--nsamples", type=int, default=32)
args = parser.parse_args()

with TemporaryDirectory() as scratch:
    folder = Path(scratch)
    rows = [
        {"question": text, "choices": [right, wrong][:: 1 - 2 * (i % 2)], "answer": i % 2}
        for i, (text, right, wrong) in enumerate(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "next_word.yaml").write_text(TASK.replace("FILE", str(folder / "rows.jsonl")))
    out = folder / "out"
    calibration = alphaquant.Calibration("bundled", num_samples=args.nsamples, seqlen=256)
    alphaquant.quantize(args.model, out, args.scheme, calibration=calibration)
    for name, path in (("original", args.model), (args.scheme, out)):
        for metric in alphaquant.evaluate_tasks(path, args.tasks.split(","), limit=args.limit, task_path=folder):
            error = "" if metric.stderr is None else f" ± {metric.stderr:.3f}"
            print(f"{name}: {metric.task} {metric.metric} {metric.value:.3f}{error}")
