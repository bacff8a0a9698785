"""Train a Vision Mamba on digit pairs (stm/data) in slots; go on exactly where the last one stopped.

    python -m tools.train vim-n --state build/train/vim-n --total-minutes 9 --minutes 5 --out build/train/vim-n/out

The same command again goes on. A slot ends at --minutes (the program's whole time, saving included), at SIGTERM, or when the last
step is done; then the averaged weights are judged on the test split of both variants and written as NAME.safetensors.
Settings are fixed by the first slot and kept in the state; how to reproduce a run: docs/training.md.
"""

from __future__ import annotations

import time

START = time.monotonic()  # before the slow imports: --minutes counts them

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from .training.loop import RECIPES, Trainer  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(RECIPES), help="recipe")
    parser.add_argument("--state", type=Path, required=True, metavar="DIR", help="state.pt and log.jsonl; what a later slot goes on from")
    parser.add_argument("--out", type=Path, metavar="DIR", help="weights, result.json and a copy of the log (default: the state's folder)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimiser steps in all (default: the recipe's)")
    length.add_argument("--total-minutes", type=float, metavar="M", help="choose the steps so that they take M minutes at the speed measured here")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop this slot after M minutes")
    length.add_argument("--extend", type=int, metavar="N", help="lengthen a training that is under way to N steps")
    parser.add_argument("--batch", type=int, help="images a step (default: the recipe's)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the recipe's)")
    parser.add_argument("--warmup", type=int, metavar="N", help="steps of the linear warm-up (default: the recipe's)")
    parser.add_argument("--ramp", type=int, nargs=2, metavar=("A", "B"), help="steps between which the clutter grows (default: the recipe's)")
    parser.add_argument("--init", type=Path, metavar="FILE", help="begin with these weights (published names, .safetensors), optimiser anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=("triton", "torch"), help="default: triton on a GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of activations (default: bfloat16 on a GPU)")
    parser.add_argument("--test-images", type=int, default=10_000, metavar="N", help="of each variant, in the final judgement")
    parser.add_argument("--part-mib", type=int, metavar="M", help="also put the state into --out, in parts of at most M MiB (--join reads them)")
    parser.add_argument("--join", type=Path, metavar="DIR", help="take the state from parts that an earlier slot left in DIR")
    args = parser.parse_args(argv)
    ramp = tuple(args.ramp) if args.ramp else None
    given = {"steps": args.steps, "batch": args.batch, "lr": args.lr, "warmup": args.warmup, "ramp": ramp}
    overrides = {key: value for key, value in given.items() if value is not None}
    gpu = args.device.startswith("cuda")
    trainer = Trainer(
        args.model,
        args.state,
        overrides=overrides,
        total_minutes=args.total_minutes,
        seed=args.seed,
        device=args.device,
        backend=args.backend or ("triton" if gpu else "torch"),
        dtype=args.dtype or ("bfloat16" if gpu else "float32"),
        join=args.join,
        extend=args.extend,
        init=args.init,
    )
    deadline = None if args.minutes is None else START + 60 * args.minutes
    done = trainer.run(deadline)
    out = args.out or args.state
    result = trainer.finish(out, test_images=args.test_images if done else min(2000, args.test_images), deadline=deadline)
    if args.part_mib:
        trainer.save_parts(out, args.part_mib << 20)
    print(json.dumps(result, indent=1))
    print(f"{'done' if done else 'stopped, the same command goes on'}: step {trainer.step} of {trainer.total_steps}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
