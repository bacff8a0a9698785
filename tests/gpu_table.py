"""Prints the tables of a tests/gpu.sh run from its rows.jsonl: python tests/gpu_table.py OUT"""

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    path = folder / "rows.jsonl"
    if not path.exists():
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parity = [row for row in rows if row["kind"] == "parity"]
    if parity:
        print("| model | rate | size | precision | max error / spread | mean | cosine | top-1 | top-5 | build s |\n" + "| --- " * 10 + "|")
    for row in parity:
        m = row["metrics"]
        size = "x".join(map(str, row["size"]))
        print(
            f"| {row['model']} | {row['rate']} | {size} | {row['precision']} | {m['max_error']:.1e} | {m['mean_error']:.1e} | {m['cosine']:.6f} "
            f"| {m['top1']:.3f} | {m['top5']:.3f} | {row['seconds']:.1f} |" + ("" if row["passed"] else " FAILED")
        )
    latency = [row for row in rows if row["kind"] == "latency"]
    if latency:
        print("\n| model | rate | batch | ms | p10 | p90 | images/s | activations MiB | build s |\n" + "| --- " * 9 + "|")
    for row in latency:
        print(
            f"| {row['model']} | {row['rate']} | {row['batch']} | {row['median_ms']:.3f} | {row['p10_ms']:.3f} | {row['p90_ms']:.3f} "
            f"| {row['batch'] / row['median_ms'] * 1e3:,.0f} | {row['memory_mib']:.0f} | {row['build_seconds']:.1f} |"
        )
    for row in rows:
        if row["kind"] not in ("parity", "latency", "cli"):
            print(json.dumps(row))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
