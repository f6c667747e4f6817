"""Size of a report and the seconds that drawing it takes, for a run of made-up figures.

    python benchmarks/report.py --layers 24 --experts 60

The run is the one that the tests draw (`tests/report/test_report.py`). Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from alphaquant.report import write_report
from report.test_report import write_quality, write_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        write_run(out, layers=args.layers, experts=args.experts, dense_layers=0)
        shares = [0.99 - 0.1 * layer / args.layers for layer in range(args.layers)]
        quality = write_quality(out / "q.json", router_by_layer=shares)
        begin = time.perf_counter()
        html, md = write_report(out, None, [quality])
        seconds = time.perf_counter() - begin
        sizes = {"html_bytes": html.stat().st_size, "md_bytes": md.stat().st_size}
    print(json.dumps({"layers": args.layers, "experts": args.experts, "seconds": round(seconds, 3), **sizes}))


if __name__ == "__main__":
    main()
