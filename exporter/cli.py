"""The `stm` command: parse, call, print. `stm-export` is `stm export`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stm.errors import ConfigError, StmError

# Nothing heavy is imported here: `stm --help` answers at once. torch, onnx and the rest come with the verbs.

_EPILOG = """exit codes: 0 ok, 2 usage, 3 missing dependency, network or GPU, 4 export failed, 5 build failed, 6 plugin missing or
node not taken, 7 parity failed, 8 performance gate failed, 9 artefact mismatch"""


def _image_size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides, default=0) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give H or HxW in pixels, for example 224 or 192x256")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: the share of tokens removed by the last layer, 0 <= rate < 1")
    return rate


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _batches(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: an empty name; separate names by one comma")
    return names


def _image_sizes(text: str) -> list[int | tuple[int, int]]:
    return [_image_size(part) for part in text.split(",")]


def _model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--model", required=required, metavar="NAME", help="vim-n, vim-t, vim-s, vim-b, vim-t-stride8, vim-s-stride8")
    parser.add_argument("--image-size", type=_image_size, default=224, metavar="H[xW]", help="pixels (default 224)")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("merge plan (without --rate and --plan nothing merges)")
    group.add_argument("--rate", type=_rate, metavar="R", help="share of tokens removed by the last layer, for example 0.2")
    group.add_argument("--plan", metavar="FILE|PRESET", help="a plan file, or stm-15, stm-20, stm-30, stm-40")
    _merge_options(group)
    group.add_argument("--align", type=_positive, metavar="N", help="leave a multiple of N tokens after each merge; kernels like 8 (default 1)")


def _merge_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rule", choices=("edge", "frontier", "spread", "one_sided"), help="which tokens merge (default edge)")
    group.add_argument(
        "--merge-weights",
        choices=("hsp", "hsp_literal", "decay", "sum", "mean"),
        help="how sources are weighted (default hsp, hidden-states protection)",
    )
    group.add_argument("--proportional-decay", action="store_true", help="a token made of s originals decays s times as long")


def _weights_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weights")
    group.add_argument("--checkpoint", metavar="FILE", help="a published .pth, a bare state dict, or .safetensors")
    group.add_argument(
        "--weights",
        choices=("pretrained", "random"),
        default="pretrained",
        help="without --checkpoint: the published ones (vim-n's are in the package, others are fetched), or random for a trial",
    )
    group.add_argument("--ema", action="store_true", help="take the checkpoint's model_ema")
    group.add_argument("--seed", type=int, default=0, help="of random weights (default 0)")
    group.add_argument("--num-classes", type=_positive, metavar="N", help="of the head (default: the published weights')")
    group.add_argument(
        "--pos-embed-resize",
        choices=("correct", "official", "keep"),
        default="correct",
        help="how a position embedding of another grid is interpolated (keep: not at all)",
    )


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _export_parser(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    _weights_options(parser)
    _plan_options(parser)
    parser.add_argument(
        "--reduction",
        metavar="METHOD[:PRESET,..]",
        help="instead of a merge plan a method that looks at the image: tome:tl-792, r-meeto:tl-792,metric=delta (METHOD alone: the paper's "
        "table 2), or FILE.json of stm plan --optimize --reduction",
    )
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", required=True, metavar="OUT", help="FILE.onnx, FILE.engine, or a directory for everything")
    group.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="of the engine (default fp16); a portable .onnx is fp32")
    group.add_argument("--opset", type=int, choices=(18, 19, 20), default=18)
    group.add_argument("--classes", metavar="FILE", help="class names, one a line (default: the published weights', ImageNet's for 1000 classes)")
    _engine_options(parser)
    group = parser.add_argument_group("parity")
    group.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare with PyTorch")
    group.add_argument("--bisect", action="store_true", help="if parity fails, name the first tensor that deviates")
    _json_option(parser)


def _engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine (-o FILE.engine)")
    group.add_argument("--batch", metavar="MIN:OPT:MAX", help="batch sizes of the profile, or one fixed size (default 1:8:128)")
    for name in ("min", "opt", "max"):
        group.add_argument(f"--{name}Shapes", metavar="images:NxCxHxW", help="the same in trtexec's spelling" if name == "min" else argparse.SUPPRESS)
    group.add_argument("--timing-cache", metavar="FILE|none", help="kernel timings, reused by later builds (default: one a user, TensorRT and GPU)")
    group.add_argument("--workspace", type=_positive, metavar="MIB", help="most scratch memory a layer may use")
    group.add_argument("--opt-level", type=int, choices=range(6), default=3, help="builder optimisation level (default 3)")
    group.add_argument("--version-compatible", action="store_true", help="also loads in later TensorRT versions")
    group.add_argument("--hardware-compatible", action="store_true", help="also runs on other GPUs from Ampere on")
    group.add_argument("--embed-plugins", action="store_true", help="put the plugin library into the engine file (which then carries code)")
    group.add_argument("--refit", action="store_true", help="weights may be exchanged later")
    group.add_argument("--tf32", action="store_true", help="let fp32 GEMMs use TF32 (parity in fp32 then fails by design)")
    group.add_argument(
        "--fp16-accumulation", action="store_true", help="let TensorRT's fp16 GEMMs add up in fp16 where that is faster: two to three times the error"
    )
    group.add_argument("--plugin-library", metavar="FILE", help="libstm_trtN.so to use instead of the package's")


def _build_options(args: argparse.Namespace) -> Any:
    """BuildOptions from the command line; None where no engine is asked for."""
    from .deploy import ENGINE_SUFFIXES, check_accumulation
    from .engine import BatchProfile, BuildOptions, default_timing_cache

    shapes = (args.minShapes, args.optShapes, args.maxShapes)
    if Path(args.output).suffix not in ENGINE_SUFFIXES:
        if args.batch or any(shapes):
            raise ConfigError(f"--batch and --*Shapes belong to engines; {args.output} has a dynamic batch of any size")
        names = (
            "timing_cache",
            "workspace",
            "version_compatible",
            "hardware_compatible",
            "embed_plugins",
            "refit",
            "tf32",
            "fp16_accumulation",
            "plugin_library",
        )
        if idle := ["--" + name.replace("_", "-") for name in names if getattr(args, name)]:
            raise ConfigError(f"{', '.join(idle)}: belongs to engines; {args.output} is none")
        return None
    if args.batch and any(shapes):
        raise ConfigError("give --batch or --minShapes/--optShapes/--maxShapes, not both")
    size = args.image_size if isinstance(args.image_size, tuple) else (args.image_size, args.image_size)
    batch = BatchProfile.parse(args.batch) if args.batch else BatchProfile.from_shapes(*shapes, size)  # told before what is missing here
    check_accumulation(args.precision or "fp16", args.fp16_accumulation)
    if args.timing_cache == "none":
        cache = None
    else:
        cache = Path(args.timing_cache) if args.timing_cache else default_timing_cache()
    return BuildOptions(
        batch=batch,
        timing_cache=cache,
        workspace_bytes=args.workspace * 1024 * 1024 if args.workspace else None,
        opt_level=args.opt_level,
        version_compatible=args.version_compatible,
        hardware_compatible=args.hardware_compatible,
        embed_plugins=args.embed_plugins,
        refit=args.refit,
        tf32=args.tf32,
        fp16_accumulation=args.fp16_accumulation,
    )


def _plan_parser(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    _plan_options(parser)
    group = parser.add_argument_group("a better plan than the paper's, from the weights (docs/plans.md)")
    group.add_argument("--optimize", action="store_true", help="search the plan that changes the model least, without labels or training")
    group.add_argument(
        "--reduction", metavar="METHOD", help="search when this method (tome, utr, ...) removes tokens; which, it decides for each image"
    )
    group.add_argument("--budget", metavar="B", help="0.6x of the true FLOPs, -40%%, 1920tl (token-layers removed), 1.2ms (--latency-table)")
    group.add_argument("--images", metavar="DIR", help="a handful of unlabelled pictures to search on (default: generated ones)")
    group.add_argument("--data", choices=("digits",), help="search on digit pairs, what vim-n was trained on")
    group.add_argument("--count", type=_positive, metavar="N", help="images to take or make (default 64, 512 on a GPU)")
    group.add_argument("--objective", choices=("kl", "state"), default="kl", help="of the logits, or the paper's class-token state error")
    group.add_argument("--seconds", type=_positive, metavar="S", help="time to search (default 600)")
    group.add_argument("--evaluations", type=_positive, metavar="N", help="plans to run, instead of or beside --seconds; alone: repeatable")
    group.add_argument("--latency-table", metavar="FILE", help='{"layer_ms": {"197": 0.041, ..}, "fixed_ms": 0.12}: the budget is then in ms')
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    _weights_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan (.json) or its picture (.png)")
    parser.add_argument("--draw", metavar="FILE.png", help="draw the plan")
    parser.add_argument("--image", metavar="FILE", help="picture to draw on")
    _json_option(parser)


def _verify_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=".onnx or .engine made by stm-export")
    parser.add_argument("--checkpoint", metavar="FILE", help="the weights it was made from")
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--reference", metavar="DIR", help="compare with saved inputs and outputs instead of PyTorch (needs no torch)")
    parser.add_argument("--batch", type=_batches, default=[1, 5], metavar="N[,N..]", help="batch sizes (default 1,5)")
    parser.add_argument("--bisect", action="store_true", help="if parity fails, name the first tensor that deviates")
    parser.add_argument("--plugin-library", metavar="FILE", help="libstm_trtN.so to use instead of the package's")
    _json_option(parser)


def _bench_parser(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", metavar="FILE", help=".engine or .onnx made by stm-export (before --vs, which takes what follows it)")
    what.add_argument("--model", type=_names, metavar="NAME[,..]", help="build what is timed: vim-n, vim-t, vim-s, vim-b, ...")
    what.add_argument("--suite", metavar="NAME", help="a set of cases: headline, rate, resolution, batch, performance (all of them)")
    what.add_argument("--from", dest="earlier", type=_names, metavar="JSON[,..]", help="measure nothing: report earlier bench.json files, merged")
    group = parser.add_argument_group("cases (with --model: all combinations)")
    group.add_argument("--rate", type=_names, metavar="R[,..]", help="share of tokens removed, stm-15 .. stm-40, or a plan file (default 0)")
    group.add_argument("--batch", type=_batches, metavar="N[,..]", help="default: an engine file's profile; 1,128 to build engines; else 1")
    group.add_argument("--image-size", type=_image_sizes, metavar="H[xW][,..]", help="pixels (default 224)")
    group.add_argument("--precision", type=_names, metavar="P[,..]", help="fp16, bf16, fp32 (default fp16 for engines, else fp32)")
    group.add_argument("--runtime", choices=("engine", "onnx", "eager"), help="what runs --model (default engine)")
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--vs",
        type=_names,
        nargs="+",
        action="extend",
        default=[],
        metavar="RIVAL",
        help="eager, compile, mamba_ssm, onnx, onnx-cpu, deit, unmerged (ours without the plan), fp16-accumulation (ours, "
        "GEMMs added up in fp16), engine@N (ours on pieces of N images), or a file",
    )
    group.add_argument("--launch", choices=("graph", "plain", "both"), default="graph", help="CUDA graph or plain launches (default graph)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="for .onnx, --runtime onnx and eager (default: a GPU if there is one)")
    group.add_argument("--rounds", type=_positive, default=15, metavar="N", help="interleaved rounds (default 15)")
    group.add_argument("--round-ms", type=_positive, default=60, metavar="MS", help="length of a backend's turn in a round (default 60)")
    group.add_argument("--profile", action="store_true", help="time of each node of an engine, by torch module, with floors")
    group.add_argument("--max-ratio", type=float, metavar="R", help="exit code 8 if the time is over R times any rival's")
    group.add_argument("--opt-level", type=int, choices=range(6), default=3, help="of engines built here (default 3)")
    group.add_argument("--plugin-library", metavar="FILE", help="libstm_trtN.so to use instead of the package's")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="DIR", help="bench.json, bench.md, plots; engines built are kept there and used again")
    group.add_argument("--document", metavar="FILE.md", help="put the tables between this file's `stm bench` markers, plots beside it")
    _json_option(parser)


def _named_plan(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FILE.json")
    return name, file


def _accuracy_parser(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="vim-n (its weights are in the package), or another with --checkpoint: 100 classes")
    what.add_argument("--from", dest="earlier", type=_names, metavar="DIR[,..]", help="measure nothing: report earlier -o folders, one a model")
    group = parser.add_argument_group("weights")
    group.add_argument("--checkpoint", metavar="FILE", help="trained on stm.data's digit pairs: .safetensors, .pth")
    group.add_argument("--weights", choices=("pretrained", "random"), default="pretrained", help="random: a trial of the command, no accuracy")
    group.add_argument("--seed", type=int, default=0, help="of random weights (default 0)")
    group = parser.add_argument_group("the table (more can be added to the same -o later)")
    group.add_argument(
        "--methods",
        type=_names,
        metavar="M[,..]",
        help="groups weights, generators, rivals, frozen, controls, all; or single methods such as stm, stm-mean, mtr, frozen-mtr, resolution; "
        "mtr@NAME and rivals@NAME before the layers of --plan NAME=FILE (default weights,generators,rivals,controls)",
    )
    group.add_argument("--token-layers", type=_batches, metavar="N[,..]", help="token-layers removed (default those of stm-15 .. stm-40)")
    group.add_argument("--flops", type=_names, metavar="S[,..]", help="true FLOPs saved, 40%% or 0.4, or left, 0.6x (default 40%%)")
    group.add_argument("--plan", type=_named_plan, action="append", default=[], metavar="NAME=FILE", help="a plan of yours; may be repeated")
    group.add_argument("--variants", type=_names, default=["centred", "anywhere"], metavar="V[,..]", help="of the images (default centred,anywhere)")
    group.add_argument("--images", type=_positive, default=2000, metavar="N", help="test images of each variant (default 2000)")
    group.add_argument(
        "--latency",
        type=_names,
        nargs="?",
        const=["default"],
        metavar="M[,..]",
        help="time TensorRT engines of these methods or groups and of all --plan (default: stm, stm-mean, tome, mtr, resolution, as far as measured)",
    )
    group.add_argument("--latency-batch", type=_batches, default=[1, 128], metavar="N[,..]", help="default 1,128")
    group.add_argument(
        "--build-jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="build the engines, up to a minute each, by N processes, 5 GB each; kernels are then chosen on a busy GPU (default 1: alone)",
    )
    group.add_argument("--latency-only", action="store_true", help="go on with the table in -o: time engines, no accuracy; needs no weights")
    group = parser.add_argument_group("running")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    group.add_argument("--batch", type=_positive, metavar="N", help="images at once (default on a GPU 2048 for vim-n, 16 on a CPU)")
    group.add_argument("--minutes", type=float, metavar="M", help="start nothing new after M minutes; the same command goes on")
    group.add_argument("--plugin-library", metavar="FILE", help="libstm_trtN.so to use instead of the package's")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="DIR", help="records, accuracy.json, accuracy.md, plots; the same again goes on where it stopped")
    group.add_argument("--document", metavar="FILE.md", help="put the tables between this file's `stm bench` markers, plots beside it")
    _json_option(parser)


def _eval_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help=".onnx or .engine files made by stm-export; without: --model, in PyTorch")
    _model_options(parser, required=False)
    _weights_options(parser)
    group = parser.add_argument_group("plans (with --model; all in one pass over the data)")
    group.add_argument(
        "--plan",
        type=_names,
        metavar="P[,..]",
        help="none, stm-15 .. stm-40, a rate, a plan file, or a rival METHOD:PRESET such as tome:tl-792 (METHOD alone: the paper's table 2); "
        "default none",
    )
    _merge_options(group)
    group.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="of PyTorch (default fp32, as published)")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="a folder of class folders, a flat folder with val.txt or --labels, or WebDataset shards (a folder of .tar files, or the files)",
    )
    group.add_argument("--labels", metavar="FILE", help="lines NAME LABEL: a class index from 0 or a synset (also LOC_val_solution.csv)")
    group.add_argument("--class-order", metavar="FILE", help="names of all class folders, one a line, in the order of the class index")
    group.add_argument("--crop-ratio", type=float, metavar="R", help="share of the resized image that is kept (default: the file's, 0.875)")
    group.add_argument("--limit", type=_positive, metavar="N", help="only N images, evenly spread: a trial")
    group.add_argument("--unreadable", choices=("stop", "skip"), default="stop", help="at an image that cannot be decoded (default stop)")
    group = parser.add_argument_group("running (several GPUs: torchrun --nproc-per-node N -m exporter eval ..)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="for .onnx and --model (default: a GPU if there is one)")
    group.add_argument("--batch", type=_positive, metavar="N", help="images at once (default: the engines' best; 64 on a GPU, 16 on a CPU)")
    group.add_argument("--workers", type=int, choices=range(257), metavar="N", help="processes that decode images (default: by the cores)")
    group.add_argument("--plugin-library", metavar="FILE", help="libstm_trtN.so to use instead of the package's")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="eval.json, eval.md, predictions; the same again goes on where it stopped"
    )
    _json_option(parser)


def _inspect_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help=".onnx, .engine, a plan (.json), or weights (.pth, .safetensors)")
    _json_option(parser)


def _doctor_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--require-gpu", action="store_true", help="exit code 3 unless engines can be built here")
    _json_option(parser)


# --- verbs: each returns (object for --json, lines for people) ---------------------------------------------------------

Answer = tuple[dict[str, Any], list[str]]


def _figures(summary: dict[str, Any]) -> list[str]:
    seqlen = summary["seqlen"]
    runs: list[str] = []
    for length in seqlen:
        if runs and runs[-1].split("x")[0] == str(length):
            runs[-1] = f"{length}x{int(runs[-1].partition('x')[2] or 1) + 1}"
        else:
            runs.append(str(length))
    return [
        f"  tokens a layer        {' '.join(runs)}",
        f"  tokens left           {summary['tokens_left']} of {seqlen[0]}",
        f"  token-layers removed  {summary['token_layers_removed']} of {seqlen[0] * len(seqlen)}",
        f"  GFLOPs, true          {summary['gflops_true']:.3f} ({summary['gflops_true_change']:+.1%}; both scan directions and the merge)",
        f"  GFLOPs, paper         {summary['gflops_paper']:.3f} ({summary['gflops_paper_change']:+.1%}; one direction, as papers print)",
    ]


def _warn_random(is_random: bool, what: str) -> list[str]:
    return [f"  WARNING: {what}. Good for trials of speed and parity, not for predictions."] if is_random else []


def _run_export(args: argparse.Namespace) -> Answer:
    from .deploy import export

    classes = None
    if args.classes:
        try:
            classes = Path(args.classes).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read --classes {args.classes}: {error}") from None
    result = export(
        args.model,
        args.output,
        checkpoint=args.checkpoint,
        weights=args.weights,
        ema=args.ema,
        rate=args.rate,
        plan=args.plan,
        merge_weights=args.merge_weights,
        rule=args.rule,
        proportional_decay=args.proportional_decay,
        align=args.align,
        reduction=args.reduction,
        image_size=args.image_size,
        num_classes=args.num_classes,
        classes=classes,
        precision=args.precision,
        opset=args.opset,
        seed=args.seed,
        pos_embed_resize=args.pos_embed_resize,
        verify_output=args.verify,
        bisect=args.bisect,
        build=_build_options(args),
        plugin_library=args.plugin_library,
        show_progress=True,
    )
    lines = [f"{result.model}, {result.precision}, {result.weights}", *_warn_random(result.weights_random, result.weights), *_figures(result.summary)]
    lines += result.parity.lines() if result.parity else ["  parity NOT checked (--no-verify)"]
    if result.build:
        b = result.build
        lines.append(
            f"  built in {b['seconds']:.1f} s (Builder {b['builder_seconds']:.1f} s), {b['layers']} layers, {b['plugin_layers']} of them ours, "
            f"{b['device_memory_bytes'] / 2**20:.0f} MiB of activations"
        )
    for t in result.timing or []:
        rate = t["batch"] / t["median_ms"] * 1e3
        lines.append(
            f"  batch {t['batch']:<4} {t['median_ms']:8.3f} ms (p10 {t['p10_ms']:.3f}, p90 {t['p90_ms']:.3f})  {rate:,.0f} images/s, CUDA graph"
        )
    lines += [
        f"wrote {result.outputs[0]} ({result.bytes / 1e6:.1f} MB) in {sum(result.seconds.values()):.0f} s",
        *(f"      {made}" for made in result.outputs[1:]),
    ]
    return {"exit_code": 0, **result.to_dict()}, lines


def _optimized(args: argparse.Namespace) -> Any:
    """What --optimize found; None without it."""
    if not args.optimize:
        belong = ("budget", "reduction", "images", "data", "count", "seconds", "evaluations", "latency_table", "checkpoint")
        if idle := [name for name in belong if getattr(args, name)]:
            raise ConfigError(f"--{idle[0].replace('_', '-')} belongs to --optimize")
        return None
    if args.budget is None:
        raise ConfigError("--optimize needs --budget, for example 0.6x of the true FLOPs")
    given = {"--rate": args.rate, "--plan": args.plan, "--rule": args.rule, "--merge-weights": args.merge_weights}
    if idle := [option for option, value in {**given, "--proportional-decay": args.proportional_decay, "--align": args.align}.items() if value]:
        raise ConfigError(f"{', '.join(idle)}: --optimize chooses that itself")
    if args.output and Path(args.output).suffix not in (".json", ".png"):
        raise ConfigError(f"-o {args.output}: give .json for the plan or .png for its picture")
    from .plan_search import search_plan

    return search_plan(
        args.model,
        args.budget,
        reduction=args.reduction,
        checkpoint=args.checkpoint,
        weights=args.weights,
        ema=args.ema,
        seed=args.seed,
        num_classes=args.num_classes,
        pos_embed_resize=args.pos_embed_resize,
        image_size=args.image_size,
        images=args.images,
        data=args.data,
        count=args.count,
        objective=args.objective,
        seconds=args.seconds,
        evaluations=args.evaluations,
        latency_table=args.latency_table,
        device=args.device,
        save=args.output if args.output and Path(args.output).suffix == ".json" else None,
        show_progress=True,
    )


def _run_plan(args: argparse.Namespace) -> Answer:
    from stm import make_plan, model_config, plan_summary

    from .deploy import choose_plan

    config = model_config(args.model, args.image_size)
    if args.reduction and (args.draw or (args.output and Path(args.output).suffix == ".png")):
        raise ConfigError("--reduction: there is no one plan to draw, the tokens that go differ from image to image; give -o FILE.json")
    found = _optimized(args)
    if args.reduction:
        return _schedule_answer(args, config, found)
    plan = (
        found.plan
        if found
        else choose_plan(
            args.model,
            args.image_size,
            rate=args.rate,
            plan=args.plan,
            merge_weights=args.merge_weights,
            rule=args.rule,
            proportional_decay=args.proportional_decay,
            align=args.align,
        )
        or make_plan(config)
    )
    written, drawings = [], [args.draw] if args.draw else []
    if args.output:
        suffix = Path(args.output).suffix
        if suffix == ".png":
            drawings.append(args.output)
        elif suffix == ".json":
            plan.save(args.output)
            written.append(args.output)
        else:
            raise ConfigError(f"-o {args.output}: give .json for the plan or .png for its picture")
    for path in drawings:
        from .drawing import draw_plan

        draw_plan(config, plan, path, args.image)
        written.append(path)
    summary = plan_summary(config, plan)
    height, width = config.image_size
    lines = [f"{config.name} at {height}x{width}, weights {plan.weights}", *_figures(summary), *(found.lines() if found else ())]
    answer = {"exit_code": 0, **summary, "outputs": written, **({"optimization": found.to_dict()} if found else {})}
    return answer, lines + [f"wrote {path}" for path in written]


def _schedule_answer(args: argparse.Namespace, config: Any, found: Any) -> Answer:
    """Of `stm plan --optimize --reduction`."""
    from stm.reduction import reduction_summary, save_reduction

    written = []
    if args.output:
        save_reduction(found.reduction, args.output)
        written.append(args.output)
    summary = reduction_summary(found.reduction)
    height, width = config.image_size
    lines = [f"{config.name} at {height}x{width}, {found.reduction.method}", *_figures(summary), *found.lines()]
    return {"exit_code": 0, **summary, "outputs": written, "optimization": found.to_dict()}, lines + [f"wrote {path}" for path in written]


def _run_verify(args: argparse.Namespace) -> Answer:
    from .verification import verify_file

    report = verify_file(
        args.file,
        checkpoint=args.checkpoint,
        ema=args.ema,
        reference=args.reference,
        batches=args.batch,
        bisect=args.bisect,
        plugin_library=args.plugin_library,
    )
    return {"exit_code": 0 if report else 7, **report.to_dict()}, report.lines()


def _run_bench(args: argparse.Namespace) -> Answer:
    from .bench import BenchResult, Method, bench, read_json, update_document

    given = {"--rate": args.rate, "--image-size": args.image_size, "--precision": args.precision, "--runtime": args.runtime}
    if not args.model and (idle := [option for option, value in given.items() if value]):
        raise ConfigError(f"{', '.join(idle)} belong to --model; a file or a suite has its own")
    if args.suite and args.batch:
        raise ConfigError("--batch does not go with --suite, which has its own")
    if args.earlier:
        result = BenchResult.merged(read_json(Path(path)) for path in args.earlier)
        result.max_ratio = args.max_ratio
        if args.output:
            result.write(args.output)
    else:
        result = bench(
            args.file,
            models=args.model or (),
            rates=args.rate or ("0",),
            image_sizes=args.image_size or (224,),
            precisions=args.precision,
            batches=args.batch,
            suite_name=args.suite,
            runtime=args.runtime or "engine",
            vs=[name for names in args.vs for name in names],
            launch=args.launch,
            device=args.device,
            method=Method(rounds=args.rounds, round_ms=float(args.round_ms), warmup_ms=4.0 * args.round_ms),
            profile=args.profile,
            max_ratio=args.max_ratio,
            output=args.output,
            plugin_library=args.plugin_library,
            opt_level=args.opt_level,
            show_progress=True,
        )
    if args.document:
        result.outputs += update_document(result, Path(args.document))
    return {"exit_code": result.exit_code, **result.to_dict()}, result.lines()


def _run_accuracy(args: argparse.Namespace) -> Answer:
    from .accuracy import measure, read_run, update_document
    from .accuracy.cells import DEFAULT
    from .accuracy.report import combined

    if args.earlier:
        given = {"--checkpoint": args.checkpoint, "--methods": args.methods, "--plan": args.plan, "--latency": args.latency, "-o": args.output}
        if idle := [option for option, value in given.items() if value]:
            raise ConfigError(f"{', '.join(idle)} belong to --model; --from measures nothing")
        runs = [read_run(folder) for folder in args.earlier]
    else:
        plans: dict[str, list[str]] = {}
        for name, file in args.plan:
            plans.setdefault(name, []).append(file)
        runs = [
            measure(
                args.model,
                args.output,
                checkpoint=args.checkpoint,
                weights=args.weights,
                seed=args.seed,
                methods=args.methods or DEFAULT,
                token_layers=args.token_layers,
                flops=args.flops,
                plans=plans,
                variants=args.variants,
                images=args.images,
                latency=None if args.latency is None else [*args.latency, *plans],
                latency_batches=args.latency_batch,
                build_jobs=args.build_jobs,
                latency_only=args.latency_only,
                device=args.device,
                batch=args.batch,
                minutes=args.minutes,
                plugin_library=args.plugin_library,
                show_progress=True,
            )
        ]
    if args.document:
        runs[-1].outputs += update_document(runs, args.document)
    return {"exit_code": 0, **combined(runs)}, [line for run in runs for line in run.lines()]


def _run_eval(args: argparse.Namespace) -> Answer:
    from .evaluation import evaluate

    if args.files:
        given = {"--checkpoint": args.checkpoint, "--ema": args.ema, "--plan": args.plan, "--rule": args.rule, "--precision": args.precision}
        given |= {"--merge-weights": args.merge_weights, "--proportional-decay": args.proportional_decay}
        if idle := [option for option, value in given.items() if value]:
            raise ConfigError(f"{', '.join(idle)} belong to --model; a file has its own")
    result = evaluate(
        args.data,
        args.output,
        files=args.files,
        model=args.model,
        plans=args.plan or ("none",),
        checkpoint=args.checkpoint,
        weights=args.weights,
        ema=args.ema,
        seed=args.seed,
        image_size=args.image_size,
        num_classes=args.num_classes,
        pos_embed_resize=args.pos_embed_resize,
        merge_weights=args.merge_weights,
        rule=args.rule,
        proportional_decay=args.proportional_decay,
        precision=args.precision or "fp32",
        device=args.device,
        labels=args.labels,
        class_order=args.class_order,
        crop_ratio=args.crop_ratio,
        limit=args.limit,
        unreadable=args.unreadable,
        batch=args.batch,
        workers=args.workers,
        plugin_library=args.plugin_library,
        show_progress=True,
    )
    if result is None:  # torchrun's other processes say nothing
        raise SystemExit(0)
    return {"exit_code": result.exit_code, **result.to_dict()}, result.lines()


def _run_inspect(args: argparse.Namespace) -> Answer:
    from .inspection import inspect

    found = inspect(args.file)
    lines = [f"{found['file']}: {found['kind']}"]
    for key, value in found.items():
        if key in ("file", "kind"):
            continue
        if isinstance(value, dict):
            lines.append(f"  {key}:")
            lines += [f"    {k:<22} {v}" for k, v in value.items()]
        elif isinstance(value, list) and value and isinstance(value[0], str):
            lines.append(f"  {key}:")
            lines += [f"    {item}" for item in value]
        else:
            lines.append(f"  {key:<24} {value}")
    return {"exit_code": 0, **found}, lines


def _run_doctor(args: argparse.Namespace) -> Answer:
    from .doctor import doctor

    report = doctor()
    return {"exit_code": report.exit_code(args.require_gpu), **report.to_dict()}, report.lines()


_VERBS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Answer]]] = {
    "export": ("weights + merge plan -> a verified .onnx or TensorRT engine", _export_parser, _run_export),
    "plan": ("make, explain and draw a merge plan", _plan_parser, _run_plan),
    "verify": ("compare a file with PyTorch or with saved outputs", _verify_parser, _run_verify),
    "bench": ("time a file or models against rivals, with a gate; `stm bench accuracy`: what merging costs in accuracy", _bench_parser, _run_bench),
    "bench accuracy": ("what merging costs and buys: our plans, every rival and two controls in one table", _accuracy_parser, _run_accuracy),
    "eval": ("accuracy on ImageNet or your own images, several plans in one pass", _eval_parser, _run_eval),
    "inspect": ("explain an .onnx, an engine, a plan, a weights file", _inspect_parser, _run_inspect),
    "doctor": ("what is here, what works, what to do", _doctor_parser, _run_doctor),
}


def _parser(verb: str | None = None) -> argparse.ArgumentParser:
    from stm.version import __version__

    if verb is not None:
        text, options, _ = _VERBS[verb]
        parser = argparse.ArgumentParser("stm-export" if verb == "export" else f"stm {verb}", description=text, epilog=_EPILOG, allow_abbrev=False)
        options(parser)
        parser.set_defaults(verb=verb)
    else:
        parser = argparse.ArgumentParser(
            "stm",
            description="Vision Mamba with Sequential Token Merging: plan, export, verify, bench, eval, inspect.",
            epilog=_EPILOG,
            allow_abbrev=False,
        )
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
        for name, (text, options, _) in _VERBS.items():
            if " " in name:  # a verb of two words: see main
                continue
            options(verbs.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False))
    parser.add_argument("--version", action="version", version=f"stm {__version__}")
    return parser


def main(argv: Sequence[str] | None = None, verb: str | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if verb is None and (two := " ".join(words[:2])) in _VERBS and " " in two:
        verb, words = two, words[2:]
    args = _parser(verb).parse_args(words)
    try:
        answer, lines = _VERBS[args.verb][2](args)
    except StmError as error:
        if args.json:
            print(json.dumps({"exit_code": error.exit_code, "error": type(error).__name__, "message": str(error)}))
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    try:
        print(json.dumps(answer) if args.json else "\n".join(lines), flush=True)
    except BrokenPipeError:  # `stm inspect x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(answer["exit_code"])


def main_export() -> int:
    """`stm-export`."""
    return main(verb="export")


if __name__ == "__main__":
    sys.exit(main())
