"""What can be timed: TensorRT engines, ONNX Runtime, PyTorch. Each prepares a batch and then runs one inference a call."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stm.errors import ConfigError, MissingDependencyError

from ..errors import BuildError
from ..op_schema import INPUT, OUTPUT
from .timing import CudaClock, HostClock, Prepared

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAUNCHES = ("graph", "plain")


class Backend(Protocol):
    """A name, and `prepare`: everything that happens once, so that `Prepared.run` is one inference and nothing else."""

    name: str

    def prepare(self, batch: int, launch: str) -> Prepared: ...


@functools.lru_cache(maxsize=1)
def random_images(batch: int, image_size: tuple[int, int]) -> Tensor:
    """Normal noise, the same for every backend; never zeros, on which hardware can be faster."""
    return torch.randn(batch, 3, *image_size, generator=torch.Generator().manual_seed(batch))


def require_cuda(what: str) -> None:
    """Raises:
    MissingDependencyError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise MissingDependencyError(f"{what} needs an NVIDIA GPU and a torch that can use it; torch {torch.__version__} sees none")


def captured(run: Callable[[], object], stream: Any) -> Callable[[], object]:
    """`run` in a CUDA graph; plain runs come first, so that shape changes and tuning happen outside the capture.

    The graph knows addresses only, and the next capture gives back what torch has free: what is returned keeps `run` and all it refers to.
    """
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    return functools.partial(_replay, graph, run)


def _replay(graph: Any, run: object) -> None:
    graph.replay()


def with_launch(run: Callable[[], object], stream: Any, launch: str) -> tuple[Callable[[], object], str, list[str]]:
    """(what to time, how it is launched, notes): a graph if asked for and possible, else plain launches and a note."""
    if launch != "graph":
        return run, "plain", []
    try:
        return captured(run, stream), "graph", []
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return run, "plain", [f"no CUDA graph: {str(error).strip().splitlines()[0][:160]}"]


class TorchBackend:
    """A PyTorch module, plain or through torch.compile, on cpu or cuda.

    Args:
        module: makes it, on the device and in the dtype of `precision`; called at the first `prepare`.
        weights: hash of the weights, "" if they are not a ViM's.
    """

    def __init__(
        self,
        name: str,
        module: Callable[[], nn.Module],
        image_size: tuple[int, int],
        device: str,
        precision: str,
        weights: str = "",
        compiled: bool = False,
    ) -> None:
        self.name, self.image_size, self.device, self.precision, self.weights = name, image_size, device, precision, weights
        self._make, self._compiled = module, compiled

    def prepare(self, batch: int, launch: str) -> Prepared:
        cuda = self.device == "cuda"
        if cuda:
            require_cuda(self.name)
        module = self._make()
        memory = {"weights": sum(p.numel() * p.element_size() for p in module.parameters())}
        images = random_images(batch, self.image_size).to(self.device)
        call: Callable[[Tensor], Tensor] = module
        if self._compiled:
            torch._dynamo.reset()  # a shape beyond dynamo's recompile limit would run eagerly without a word
            call = torch.compile(module, dynamic=False)
        kept: list[Tensor] = []

        def run() -> None:
            with torch.inference_mode():
                kept[:] = [call(images)]

        def logits() -> Any:
            return kept[0].float().cpu().numpy()

        if not cuda:
            run()
            return Prepared(run, HostClock(), "cpu", "host", self.precision, memory, [], logits, self.weights)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())  # the images' copy
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.cuda.stream(stream):
            run()  # tuning and compilation
            stream.synchronize()
            torch.cuda.reset_peak_memory_stats()
            run()
            stream.synchronize()
        memory["io"] = images.numel() * images.element_size()
        memory["activations"] = torch.cuda.max_memory_allocated() - before
        memory["peak"] = sum(memory[key] for key in ("weights", "io", "activations"))
        timed, how, notes = with_launch(run, stream, launch)
        return Prepared(timed, CudaClock(stream), "cuda", how, self.precision, memory, notes, logits, self.weights, kept.clear)


class OnnxBackend:
    """An ONNX model on ONNX Runtime: the CPU, or CUDA with inputs and outputs that stay on the GPU."""

    def __init__(self, name: str, model: str | Path | Callable[[], bytes], image_size: tuple[int, int], device: str, weights: str = "") -> None:
        self.name, self.image_size, self.device, self.weights = name, image_size, device, weights
        self._model = model

    def _session(self, providers: list[Any]) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Threads that go on spinning after a run would take cores from the next backend's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        model = self._model() if callable(self._model) else str(self._model)
        return onnxruntime.InferenceSession(model, options, providers=providers)

    def prepare(self, batch: int, launch: str) -> Prepared:
        return self._prepare_cuda(batch) if self.device == "cuda" else self._prepare_cpu(batch)

    def _prepare_cpu(self, batch: int) -> Prepared:
        session = self._session(["CPUExecutionProvider"])
        feeds = {INPUT: random_images(batch, self.image_size).numpy()}
        kept: list[Any] = []

        def run() -> None:
            kept[:] = session.run([OUTPUT], feeds)

        run()
        return Prepared(run, HostClock(), "cpu", "host", "fp32", {}, [], lambda: kept[0], self.weights)

    def _prepare_cuda(self, batch: int) -> Prepared:
        import numpy as np
        import onnxruntime

        require_cuda(self.name)
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise MissingDependencyError("this ONNX Runtime has no CUDA provider (pip install onnxruntime-gpu); `--vs onnx-cpu` times it on the CPU")
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        session = self._session([("CUDAExecutionProvider", {"user_compute_stream": str(stream.cuda_stream)}), "CPUExecutionProvider"])
        if "CUDAExecutionProvider" not in session.get_providers():
            raise MissingDependencyError("ONNX Runtime's CUDA provider does not load here (its CUDA or cuDNN libraries are missing)")
        images = random_images(batch, self.image_size).cuda()
        classes = session.get_outputs()[0].shape[-1]
        logits = torch.full((batch, classes), float("nan"), device="cuda")
        torch.cuda.synchronize()
        binding = session.io_binding()
        binding.bind_input(INPUT, "cuda", 0, np.float32, tuple(images.shape), images.data_ptr())
        binding.bind_output(OUTPUT, "cuda", 0, np.float32, tuple(logits.shape), logits.data_ptr())

        def run() -> None:
            session.run_with_iobinding(binding)

        def output() -> Any:
            assert images is not None  # keeps the bound buffers alive
            torch.cuda.synchronize()
            return logits.cpu().numpy()

        return Prepared(run, CudaClock(stream), "cuda", "plain", "fp32", {}, ["launches by ONNX Runtime, no CUDA graph"], output, self.weights)


class EngineBackend:
    """A TensorRT engine with one input `images` and one output `logits`, both on the GPU.

    Args:
        piece: run a batch as pieces of so many images, one enqueue after the other on one context: activations take a piece's
            memory, and a small piece's stay in the L2 cache.
    """

    def __init__(
        self,
        name: str,
        engine: Any,
        image_size: tuple[int, int],
        precision: str,
        *,
        weights: str = "",
        engine_bytes: int = 0,
        notes: tuple[str, ...] = (),
        piece: int | None = None,
    ) -> None:
        self.name, self.engine, self.image_size, self.precision, self.piece = name, engine, image_size, precision, piece
        self.weights, self.engine_bytes, self.notes = weights, engine_bytes, notes

    def _check_batch(self, batch: int) -> None:
        if self.piece is not None and batch % self.piece:
            raise ConfigError(f"{self.name}: batch {batch} is no multiple of the piece, {self.piece}")
        low, _, high = (int(shape[0]) for shape in self.engine.get_tensor_profile_shape(INPUT, 0))
        if not low <= (self.piece or batch) <= high:
            raise ConfigError(f"{self.name} takes batches {low} to {high}, asked {batch}; build it for that: stm-export --batch MIN:OPT:MAX")

    def _memory(self, batch: int, io: int) -> dict[str, int]:
        engine = self.engine
        activations = int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)
        memory = {"weights": self.engine_bytes, "activations": activations, "io": io, "peak": self.engine_bytes + activations + io}
        with contextlib.suppress(AttributeError, TypeError):  # a context that allocates nothing says what this batch needs
            import tensorrt as trt

            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.set_input_shape(INPUT, (self.piece or batch, 3, *self.image_size))
            memory["activations_at_batch"] = int(context.update_device_memory_size_for_shapes())
        return memory

    def context(self, batch: int, stream: Any) -> tuple[Any, Callable[[], None], Tensor, Tensor]:
        """(execution context, enqueue on the current stream, images, logits poisoned with NaN)."""
        self._check_batch(batch)
        context = self.engine.create_execution_context()
        with torch.cuda.stream(stream):
            images = random_images(batch, self.image_size).cuda()
            context.set_input_shape(INPUT, (self.piece or batch, *images.shape[1:]))
            logits = torch.full((batch, *tuple(context.get_tensor_shape(OUTPUT))[1:]), float("nan"), device="cuda")
            stream.synchronize()
        each = self.piece or batch
        pieces = [(images[first:].data_ptr(), logits[first:].data_ptr()) for first in range(0, batch, each)]

        def enqueue() -> None:
            for source, target in pieces:
                context.set_tensor_address(INPUT, source)
                context.set_tensor_address(OUTPUT, target)
                if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                    raise BuildError(f"{self.name}: TensorRT refused to run the engine")

        return context, enqueue, images, logits

    def prepare(self, batch: int, launch: str) -> Prepared:
        require_cuda(self.name)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        context, enqueue, images, logits = self.context(batch, stream)
        memory = self._memory(batch, sum(t.numel() * t.element_size() for t in (images, logits)))
        with torch.cuda.stream(stream):
            enqueue()
            stream.synchronize()
        timed, how, notes = with_launch(enqueue, stream, launch)
        alive = [context, images, logits]

        def output() -> Any:
            torch.cuda.synchronize()
            return alive[2].float().cpu().numpy()

        return Prepared(timed, CudaClock(stream), "cuda", how, self.precision, memory, [*self.notes, *notes], output, self.weights, alive.clear)


def release() -> None:
    """Give back what closed backends held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
