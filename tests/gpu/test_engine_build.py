"""What a build promises: bisection, options, files, timing cache, plugin errors; and two contexts on two streams."""

import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch

import exporter
from exporter.cli import main
from exporter.engine import BatchProfile, BuildOptions, build_engine, deserialize, engine_layers, load_engine, process
from exporter.engine_parity import verify_engine
from exporter.errors import ArtefactError, PluginError
from exporter.images import parity_inputs
from exporter.runtimes.trt import graph_latency_ms, tensorrt_runner

CASE = ("vim-t", 0.2, (224, 224))


def feeds(batches=(1, 5)):
    return parity_inputs((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), batches)


def infer(engine, images, context=None, stream=None):
    context = context or engine.create_execution_context()
    stream = stream or torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.from_numpy(images).cuda()
        y = torch.full((x.shape[0], 1000), float("nan"), device="cuda")
        context.set_input_shape("images", tuple(x.shape))
        context.set_tensor_address("images", x.data_ptr())
        context.set_tensor_address("logits", y.data_ptr())
        assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return y.cpu().numpy()


def test_bisect_names_the_sabotaged_tensor(builder, torch_model):
    _, lowered, _, _, options = builder(CASE, "fp16")
    broken = onnx.ModelProto()
    broken.CopyFrom(lowered)
    weight = next(i for i in broken.graph.initializer if i.name.startswith("layers.7.mixer.in_proj.weight_t"))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:, : values.shape[1] // 2] *= -1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    blob, _ = build_engine(broken, options)
    engine = deserialize(process(), blob)
    report = verify_engine(engine, broken, torch_model(CASE), "fp16", options, bisect=True)
    assert not report
    assert report.deviates_at == "layers.7.mixer.in_proj"


def kernels(engine):
    """(operands, sums) of the GEMM kernels that name them: ("f16f16", "f32") of sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize..."""
    tactics = [layer["tactic"] for layer in engine_layers(engine, process().trt)]
    return [found.groups() for tactic in tactics if (found := re.search(r"_gemm_((?:b?f\d\d){2})_b?f\d\d(b?f\d\d)_", tactic))]


@pytest.mark.parametrize("refit", [False, True])
def test_fp16_gemms_add_up_in_float32(portables, builder, torch_model, record, refit):
    """TensorRT takes kernels with fp16 operands and float32 sums for what the lowering writes, and the error shows it."""
    from exporter.passes.tensorrt import lower_tensorrt

    engine = builder(CASE, "fp16", **({"refit": True} if refit else {}))[0]
    found = kernels(engine)
    assert len(found) >= 2 * 23
    assert set(found) == {("f16f16", "f32")}
    if refit:
        return
    options = BuildOptions(batch=BatchProfile(1, 8, 64), opt_level=1)
    faster = deserialize(process(), build_engine(lower_tensorrt(onnx.load(str(portables(CASE))), "fp16", fp16_accumulation=True), options)[0])
    images = feeds((64,))[0]
    with torch.no_grad():
        want = torch_model(CASE)(torch.from_numpy(images).cuda()).cpu().numpy()
    errors = {name: float(np.abs(infer(one, images) - want).mean() / want.std()) for name, one in (("fp32", engine), ("fp16", faster))}
    record("sums", model="vim-t", mean_error=errors, kernels=sorted(set(kernels(faster))))
    assert errors["fp32"] < 0.75 * errors["fp16"]


def test_a_second_build_takes_the_timing_cache(builder, portables, work, record):
    from exporter.passes.tensorrt import lower_tensorrt

    lowered = lower_tensorrt(onnx.load(str(portables(CASE))), "fp16")
    cache = work / "own.cache"
    options = BuildOptions(batch=BatchProfile(1, 8, 16), timing_cache=cache, opt_level=1)
    _, cold = build_engine(lowered, options)
    filled = cache.stat().st_size
    _, warm = build_engine(lowered, options)
    record("build", model="vim-t", cold_seconds=cold.seconds, warm_seconds=warm.seconds)
    assert warm.cache_hits
    assert not cold.cache_hits
    assert cache.stat().st_size == filled, "the second build timed something that the first had timed"
    assert warm.seconds < cold.seconds / 2


def test_results_repeat_bit_for_bit_and_across_contexts(builder):
    engine = builder(CASE, "fp16")[0]
    images = feeds((7,))[0]
    first = infer(engine, images)
    contexts = [engine.create_execution_context() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        for context, stream in zip(contexts, streams, strict=True):
            np.testing.assert_array_equal(infer(engine, images, context, stream), first)


def test_two_contexts_run_at_once(builder):
    engine = builder(CASE, "fp16")[0]
    inputs = [torch.from_numpy(f).cuda() for f in feeds((5,))]
    want = [infer(engine, x.cpu().numpy()) for x in inputs]
    contexts = [engine.create_execution_context() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    outputs = [torch.full((5, 1000), float("nan"), device="cuda") for _ in range(2)]
    for context, x, y in zip(contexts, inputs, outputs, strict=True):
        context.set_input_shape("images", tuple(x.shape))
        context.set_tensor_address("images", x.data_ptr())
        context.set_tensor_address("logits", y.data_ptr())
    torch.cuda.synchronize()
    for _ in range(50):
        for context, stream in zip(contexts, streams, strict=True):
            assert context.execute_async_v3(stream.cuda_stream)
    torch.cuda.synchronize()
    for y, expected in zip(outputs, want, strict=True):
        np.testing.assert_array_equal(y.cpu().numpy(), expected)


def test_enqueue_is_capture_legal(builder):
    engine = builder(CASE, "fp16")[0]
    for batch in (1, 7, 64):
        assert graph_latency_ms(engine, batch, (224, 224), replays=3, rounds=3)["median_ms"] > 0


def test_refit_engine_builds_and_runs(portables, builder, torch_model):
    engine, lowered, _, _, options = builder(CASE, "fp32", refit=True)
    assert verify_engine(engine, lowered, torch_model(CASE), "fp32", options)


def test_embedded_plugin_runs_in_a_process_that_never_loaded_it(builder, work):
    _, _, _, blob, _ = builder(CASE, "fp16", embed_plugins=True)
    path = work / "embedded.plan"
    path.write_bytes(blob)
    script = (
        "import tensorrt as trt, sys; l = trt.Logger(trt.Logger.ERROR); r = trt.Runtime(l);"
        "e = r.deserialize_cuda_engine(open(sys.argv[1], 'rb').read()); assert e is not None; c = e.create_execution_context();"
        "assert c is not None; print('ok', flush=True); del c; del e; del r"
    )
    ran = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"exit {ran.returncode}: {ran.stdout[-500:]} {ran.stderr[-2000:]}"


def test_two_embedded_plans_live_in_one_process(builder):
    """Each plan brings the same creators: one registry would refuse the second."""
    engine, _, _, blob, _ = builder(CASE, "fp16", embed_plugins=True)
    second = deserialize(process(), blob)
    images = feeds((5,))[0]
    np.testing.assert_array_equal(infer(second, images), infer(engine, images))


def test_hardware_compatible_engine_computes_the_same(builder, torch_model):
    engine, lowered, _, _, options = builder(CASE, "fp16", hardware_compatible=True)
    assert verify_engine(engine, lowered, torch_model(CASE), "fp16", options)


def test_a_node_without_plugin_is_exit_code_6(builder, monkeypatch):
    _, lowered, _, _, options = builder(CASE, "fp16")
    renamed = onnx.ModelProto()
    renamed.CopyFrom(lowered)
    next(n for n in renamed.graph.node if n.op_type == "StmMambaScan").op_type = "StmNoSuchOp"
    with pytest.raises(PluginError) as caught:
        build_engine(renamed, options)
    assert caught.value.exit_code == 6


def test_command_line_whole_way(work, record, capsys):
    """stm-export -> engine, sidecar, reference; verify against PyTorch and saved outputs; inspect; refuse a changed file."""
    out = work / "cli" / "vim.engine"
    arguments = ["export", "--model", "vim-t", "--weights", "random", "--plan", "stm-20", "--batch", "1:8:64", "--opt-level", "1", "-o", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "parity PASSED" in printed
    assert "images/s" in printed
    record("cli", text=printed)
    assert sorted(p.name for p in out.parent.iterdir()) == ["vim.engine", "vim.engine.json", "vim.reference"]
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--reference", str(out.with_suffix(".reference"))]) == 0
    assert main(["inspect", str(out)]) == 0
    report = exporter.inspect(out)
    assert report["plugin_layers"] == 74  # 24 layers of conv + x_proj, scan, norm; patch rows; the last norm
    assert report["matches_sidecar"]
    blob = bytearray(out.read_bytes())
    blob[len(blob) // 2] ^= 1
    out.write_bytes(bytes(blob))
    with pytest.raises(ArtefactError, match="do not belong together"):
        load_engine(out)


@pytest.mark.parametrize("rule", ["edge", "spread", "frontier", "one_sided"])
@pytest.mark.parametrize("weights", ["hsp", "mean", "sum", "decay"])
def test_every_rule_and_weight_is_built_and_verified(work, rule, weights):
    out = work / f"{rule}-{weights}" / "vim.engine"
    merging = ["--rate", "0.2", "--rule", rule, "--merge-weights", weights]
    assert main(["export", "--model", "vim-n", *merging, "--batch", "1:8:8", "--opt-level", "1", "-o", str(out)]) == 0


def test_engine_verifies_without_torch(work):
    out = work / "cli" / "fresh.engine"
    assert main(["export", "--model", "vim-t", "--weights", "random", "--batch", "1:5:5", "--opt-level", "1", "-o", str(out)]) == 0
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch' or name.startswith('torch.'): raise ImportError('torch is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from exporter.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "verify", str(out), "--reference", str(out.with_suffix(".reference"))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-1000:] + ran.stderr[-2000:]


def test_polygraphy_runs_the_lowered_model_with_the_shim(work, portables, record):
    """What a Polygraphy user types: the plugin by --plugins, our reference by --load-inputs and --load-outputs."""
    import stm
    from exporter.libraries import load_plugin
    from exporter.parity import verify
    from exporter.passes.tensorrt import lower_tensorrt

    model = stm.create_model("vim-t", plan=stm.make_plan(stm.model_config("vim-t"), rate=0.2))
    report = verify(portables(CASE), model, batches=(1,))
    folder = work / "polygraphy"
    report.save_reference(folder)
    onnx.save(lower_tensorrt(onnx.load(str(portables(CASE))), "fp32"), str(folder / "lowered.onnx"))
    core = load_plugin().path
    shim = core.with_name(core.stem + "_static.so")
    polygraphy = shutil.which("polygraphy")
    assert polygraphy
    command = [polygraphy, "run", "lowered.onnx", "--trt", "--strongly-typed", "--plugins", str(shim), "--builder-optimization-level", "1"]
    command += ["--load-inputs", "inputs.json", "--load-outputs", "outputs.json", "--atol", "1e-3", "--check-error-stat", "max"]
    for option in ("--trt-min-shapes", "--trt-opt-shapes", "--trt-max-shapes"):
        command += [option, "images:[1,3,224,224]"]
    ran = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False)
    record("polygraphy", command=" ".join(["polygraphy", *command[1:]]).replace(str(shim.parent), "LIB"), exit_code=ran.returncode)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]


def test_runner_reports_nan_as_failure(builder, torch_model):
    engine = builder(CASE, "fp16")[0]
    bad = np.full((1, 3, 224, 224), np.nan, dtype=np.float32)
    from exporter.errors import ParityError
    from exporter.parity import judge

    with pytest.raises(ParityError, match="not finite"):
        judge(tensorrt_runner(engine), torch_model(CASE), "fp16", [bad])
