"""Classify an image with a TensorRT engine made by stm-export: needs tensorrt, torch and pillow, and the plugin library.

python classify_engine.py vim.engine cat.jpg --plugin libstm_trt10.so

`Engine` takes and gives torch tensors, without a copy, on torch's current stream; copy it into your app.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

OURS = "StmMambaScan"  # a plugin of every engine that needs the library


class SampleError(RuntimeError):
    """What is wrong and what to do; `exit_code` is the one that the stm tools use for it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def load_plugins(trt: Any, path: str | None) -> None:
    """Register the plugins of a library with TensorRT; without a path, of the library in the installed stm package."""
    registry = trt.get_plugin_registry()
    if OURS in (creator.name for creator in registry.all_creators):  # a second load would be refused
        return
    if path is None:
        try:
            from exporter.libraries import load_plugin
        except ImportError:
            raise SampleError("the stm package is not installed: name the plugin library, --plugin libstm_trt10.so", 6) from None
        try:
            load_plugin()
        except RuntimeError as error:
            raise SampleError(str(error), getattr(error, "exit_code", 6)) from None
        return
    if not Path(path).is_file():
        raise SampleError(f"no plugin library {path}", 6)
    major, named = trt.__version__.partition(".")[0], re.match(r"libstm_trt(\d+)", Path(path).name)
    if named and named[1] != major:  # TensorRT would take it and die later
        raise SampleError(f"{path} is for TensorRT {named[1]}, this is {trt.__version__}; take libstm_trt{major}.so", 6)
    if "_static" in Path(path).name:  # it registers when it is opened, and must not be given to load_library
        ctypes.CDLL(str(Path(path).resolve()))
    elif registry.load_library(str(path)) is None:
        raise SampleError(f"TensorRT {trt.__version__} refuses {path} (its reason is above)", 6)
    if OURS not in (creator.name for creator in registry.all_creators):
        raise SampleError(f"{path} has no plugin {OURS}; is it libstm_trt{major}.so?", 6)


class Engine:
    """An engine with its sidecar `PATH.json`. Call it with images, get logits.

    A batch larger than the engine's runs in pieces of the engine's largest, one after the other: an engine built for 32 images
    takes 128 in the activation memory of 32.

    Args:
        use_graph: record the kernels of a batch size once and launch them together from then on. The images are then
            copied into a buffer of the engine, and the logits are its buffer: the next call overwrites them. A batch
            size other than the last call's is recorded anew.
    """

    def __init__(self, path: str, *, plugin: str | None = None, use_graph: bool = False) -> None:
        sidecar = Path(path + ".json")
        try:
            self.meta = json.loads(sidecar.read_text(encoding="utf-8"))
            found = self.meta["schema"], self.meta["kind"]
            self.size, self.classes = tuple(self.meta["image_size"]), self.meta["classes"]
            self.input, self.output, self.normalization = self.meta["input"], self.meta["output"], self.meta["normalization"]
            built = self.meta["tensorrt"], self.meta["gpu"]["sm"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SampleError(f"{sidecar} is not the sidecar of an engine: {error!r}. stm-export writes it beside the engine", 9) from None
        if found != (1, "engine"):
            raise SampleError(f"{sidecar} has schema {found[0]}, kind {found[1]!r}; this program reads schema 1, kind 'engine'", 9)
        # TensorRT without a driver ends the process: ask torch first.
        if not torch.cuda.is_available():
            raise SampleError("torch finds no GPU. An engine runs on an NVIDIA GPU only; `stm-export -o vim.onnx` makes a file for the CPU", 3)
        try:
            import tensorrt as trt
        except ImportError:
            raise SampleError(f"no tensorrt; the engine was built with {built[0]}: pip install 'tensorrt=={built[0]}.*'", 3) from None

        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        # A version-compatible engine carries the code of a runtime, and TensorRT asks for leave to run it.
        self._runtime.engine_host_code_allowed = bool((self.meta.get("build") or {}).get("version_compatible"))
        if plugin is not None or not (self.meta.get("plugin") or {}).get("embedded"):
            load_plugins(trt, plugin)
        try:
            self._engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
        except OSError as error:
            raise SampleError(f"cannot read {path}: {error.strerror}", 9) from None
        if self._engine is None:
            here = trt.__version__, ".".join(map(str, torch.cuda.get_device_capability()))
            raise SampleError(
                f"TensorRT cannot load {path} (its reason is above). It was built with TensorRT {built[0]} for compute capability {built[1]}; "
                f"this is TensorRT {here[0]}, {here[1]}. If they differ, build it on this machine with stm-export",
                9,
            )
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        shape = tuple(self._engine.get_tensor_shape(self.input)) if self.input in names else None
        if names != {self.input, self.output} or shape[1:] != (3, *self.size):
            raise SampleError(f"{path} has tensors {sorted(names)}, input {shape}; its sidecar says {self.input}, {self.output}, {self.size}", 9)
        self.batches = [shape[0] for shape in self._engine.get_tensor_profile_shape(self.input, 0)]  # min, opt, max
        self.num_classes = self._engine.get_tensor_shape(self.output)[1]
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise SampleError("TensorRT cannot make an execution context; is the GPU's memory full?", 1)
        self._use_graph = use_graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._images = self._logits = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images. Does not wait: the result is ready for whatever follows on the current stream.

        Args:
            images: (batch, 3, height, width), float32, on the GPU, contiguous, normalised.

        Returns:
            (batch, num_classes), float32, on the GPU.
        """
        batch, fits = images.shape[0] if images.ndim else 0, tuple(images.shape[1:]) == (3, *self.size)
        if not (fits and (self.batches[0] <= batch <= self.batches[2] or (batch and batch % self.batches[2] == 0))):
            takes = f"({self.batches[0]}..{self.batches[2]}, 3, {self.size}), or batches that are multiples of {self.batches[2]}"
            raise SampleError(f"images have shape {tuple(images.shape)}, the engine takes {takes}", 2)
        if images.dtype != torch.float32 or not images.is_cuda or not images.is_contiguous():
            raise SampleError(
                f"images are {images.dtype} on {images.device}, strides {images.stride()}; the engine takes contiguous float32 on the GPU", 2
            )
        if not self._use_graph:
            logits = images.new_empty((batch, self.num_classes))
            self._enqueue(images, logits)
            return logits
        if self._graph is None or self._images.shape != images.shape:
            self._record(images)
        assert self._graph is not None
        self._images.copy_(images)
        self._graph.replay()
        return self._logits

    def _enqueue(self, images: torch.Tensor, logits: torch.Tensor) -> None:
        for piece, result in zip(images.split(self.batches[2]), logits.split(self.batches[2]), strict=True):
            if not (
                self._context.set_input_shape(self.input, tuple(piece.shape))
                and self._context.set_tensor_address(self.input, piece.data_ptr())
                and self._context.set_tensor_address(self.output, result.data_ptr())
            ):
                raise SampleError(f"TensorRT refuses images of shape {tuple(piece.shape)} (its reason is above)", 1)
            if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise SampleError("TensorRT cannot run the engine (its reason is above)", 1)

    def _record(self, images: torch.Tensor) -> None:
        self._graph = None
        self._images, self._logits = images.clone(), images.new_empty((images.shape[0], self.num_classes))
        self._enqueue(self._images, self._logits)  # the first run of a batch size does work that must not be recorded
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._enqueue(self._images, self._logits)
        self._graph = graph


def preprocess(image: Image.Image, size: tuple[int, ...], normalization: dict[str, Any]) -> torch.Tensor:
    """Resize (bicubic), centre crop, scale to 0..1, normalise; returns (1, 3, height, width), float32."""
    height, width = size
    image = image.convert("RGB")
    ratio = normalization["crop_ratio"]
    least_height, least_width = int(height / ratio), int(width / ratio)
    if image.width * least_height <= image.height * least_width:
        resized = (least_width, max(least_height, int(least_width * image.height / image.width)))
    else:
        resized = (max(least_width, int(least_height * image.width / image.height)), least_height)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, 3).float() / 255
    pixels = (pixels - torch.tensor(normalization["mean"])) / torch.tensor(normalization["std"])
    return pixels.permute(2, 0, 1)[None].contiguous()


def median_ms(engine: Engine, images: torch.Tensor, runs: int) -> float:
    """Median time on the GPU of a call, after some to warm up."""
    times = []
    for index in range(-max(10, runs // 10), runs):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        engine(images)
        end.record()
        end.synchronize()
        if index >= 0:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    def count(text: str) -> int:
        if not (text.isdecimal() and 1 <= int(text) <= 1_000_000):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000000")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", help=".engine made by stm-export; its .engine.json lies beside it")
    parser.add_argument("image", nargs="?")
    parser.add_argument("--plugin", help="the plugin library (default: that of the installed stm package)")
    parser.add_argument("--input", help="instead of an image: .npy, float32 (N, 3, H, W), normalised")
    parser.add_argument("--batch", type=count, help="repeat the image N times")
    parser.add_argument("--graph", action="store_true", help="run as a CUDA graph")
    parser.add_argument("--benchmark", type=count, metavar="N", help="time N runs and print the median")
    parser.add_argument("--dump", help="write the logits: .npy, float32 (N, classes)")
    args = parser.parse_args(words)
    if (args.image is None) == (args.input is None):
        parser.error("give an image or --input")
    if args.input and args.batch:
        parser.error("--batch repeats an image; with --input the file says how many images there are")
    return args


def main() -> None:
    args = parse()
    try:
        run(args)
    except SampleError as error:
        sys.exit((print(f"classify_engine: {error}", file=sys.stderr), error.exit_code)[1])


def run(args: argparse.Namespace) -> None:
    engine = Engine(args.engine, plugin=args.plugin, use_graph=args.graph)
    if engine.meta["weights_random"]:
        print(f"WARNING: {engine.meta['weights']}: the classes below mean nothing", file=sys.stderr)
    if args.input:
        import numpy as np

        try:
            images = torch.from_numpy(np.ascontiguousarray(np.load(args.input, allow_pickle=False), dtype=np.float32))
        except (OSError, ValueError) as error:
            raise SampleError(f"cannot read {args.input}: {error}", 2) from None
    else:
        try:
            images = preprocess(Image.open(args.image), engine.size, engine.normalization)
        except OSError as error:
            raise SampleError(f"cannot read image {args.image}: {error}", 2) from None
        images = images.expand(args.batch or 1, -1, -1, -1)

    # A stream of our own: on the default stream TensorRT would synchronise.
    with torch.cuda.stream(torch.cuda.Stream()):
        images = images.contiguous().cuda()
        logits = engine(images).cpu()
        if not logits.isfinite().all():
            raise SampleError(f"the logits are not finite; check the engine with `stm verify {args.engine}`", 1)
        if args.dump:
            import numpy as np

            np.save(args.dump, logits.numpy())
        for index, row in enumerate(logits.softmax(1) if args.input else logits[:1].softmax(1)):
            best = row.topk(min(1 if args.input else 5, len(row)))
            for chance, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                print(f"{f'image {index}: ' if args.input else ''}{chance:7.2%}  {engine.classes[label] if engine.classes else label}")
        if args.benchmark:
            graph = "CUDA graph" if args.graph else "no CUDA graph"
            ms = median_ms(engine, images, args.benchmark)
            print(f"latency: median {ms:.4f} ms ({args.benchmark} runs, batch {len(images)}, {graph}, {torch.cuda.get_device_name()})")


if __name__ == "__main__":
    main()
