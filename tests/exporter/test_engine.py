"""Engines without TensorRT: options, sidecar, refusals, exit codes. What needs the real thing is in tests/gpu."""

import hashlib
import json
import sys
import types

import pytest
import torch

import exporter.deploy as deploy_module
import exporter.engine as engine_module
import exporter.inspection as inspection_module
import exporter.verification as verification_module
import stm
from exporter.bench.workshop import Spec, Workshop
from exporter.cli import main
from exporter.engine import BatchProfile, BuildOptions, check_fits_machine, read_sidecar, sidecar_path
from exporter.errors import ArtefactError, BuildError, ExportError, PluginError
from exporter.gpus import Driver, Gpu
from exporter.libraries import PluginLibrary
from stm.errors import ConfigError, MissingDependencyError

SIZE = (224, 224)
H100 = {"name": "NVIDIA H100", "sm": "9.0"}


@pytest.mark.parametrize(("text", "triple"), [("8", (8, 8, 8)), ("1:8:128", (1, 8, 128)), ("1:1:1", (1, 1, 1))])
def test_batch_profile(text, triple):
    profile = BatchProfile.parse(text)
    assert (profile.min, profile.opt, profile.max) == triple


@pytest.mark.parametrize("text", ["", "0", "8:1:128", "1:2", "a:b:c", "1:8:128:9", "-1", "1:256:128", "²"])
def test_batch_profile_refuses(text):
    with pytest.raises(ConfigError, match="batch"):
        BatchProfile.parse(text)


SHAPES = {
    "all": (("images:1x3x224x224", "images:8x3x224x224", "images:32x3x224x224"), (1, 8, 32)),
    "max alone": ((None, None, "images:16x3x224x224"), (16, 16, 16)),
    "min and max": (("1x3x224x224", None, "16x3x224x224"), (1, 16, 16)),
    "none": ((None, None, None), (1, 8, 128)),
}


@pytest.mark.parametrize(("texts", "triple"), SHAPES.values(), ids=SHAPES)
def test_trtexec_spelling(texts, triple):
    profile = BatchProfile.from_shapes(*texts, SIZE)
    assert (profile.min, profile.opt, profile.max) == triple


@pytest.mark.parametrize("text", ["input:1x3x224x224", "images:1x3x384x384", "images:1x3x224", "images:ax3x224x224", "images:²x3x224x224"])
def test_trtexec_spelling_refuses(text):
    with pytest.raises(ConfigError, match=r"images|fixed at export"):
        BatchProfile.from_shapes(text, None, None, SIZE)


def test_a_batch_of_none_is_not_an_absent_one():
    with pytest.raises(ConfigError, match="batch 0:16:16"):
        BatchProfile.from_shapes("images:0x3x224x224", None, "images:16x3x224x224", SIZE)


def test_opt_level_is_bounded():
    with pytest.raises(ConfigError, match="0 to 5"):
        BuildOptions(opt_level=6)


@pytest.fixture
def engine(tmp_path):
    """A plan file of nonsense with a whole sidecar."""
    path = tmp_path / "vim.engine"
    path.write_bytes(b"plan")
    data = {
        "schema": 1,
        "kind": "engine",
        "model": "vim-t",
        "precision": "fp16",
        "image_size": [224, 224],
        "normalization": {},
        "num_classes": 1000,
        "tensorrt": "10.6.0",
        "gpu": H100,
        "engine_sha256": hashlib.sha256(b"plan").hexdigest(),
        "batch": {"min": 1, "opt": 8, "max": 128},
        "weights_sha256": "0",
        "plan": None,
        "build": {},
    }

    def write(**changes):
        sidecar_path(path).write_text(json.dumps({k: v for k, v in (data | changes).items() if v != "DROP"}))
        return path

    write()
    return path, write


MISFITS = {
    "another file": ({"engine_sha256": "ab" * 32}, "10.6.0", H100, "sidecar says abab"),
    "another TensorRT": ({}, "11.1.0", H100, r"built by TensorRT 10\.6\.0, this is 11\.1\.0"),
    "another GPU": ({}, "10.6.0", {"name": "NVIDIA L4", "sm": "8.9"}, r"H100 \(sm 9\.0\), this is NVIDIA L4 \(sm 8\.9\)"),
}


@pytest.mark.parametrize(("changes", "version", "device", "message"), MISFITS.values(), ids=MISFITS)
def test_engine_that_does_not_fit_is_refused_with_both_values(engine, changes, version, device, message):
    path, write = engine
    write(**changes)
    with pytest.raises(ArtefactError, match=message) as caught:
        check_fits_machine(path, read_sidecar(path), path.read_bytes(), version, device)
    assert caught.value.exit_code == 9


def test_engine_that_fits_and_compatible_ones_pass(engine):
    path, write = engine
    check_fits_machine(path, read_sidecar(path), b"plan", "10.6.0", H100)
    write(build={"version_compatible": True, "hardware_compatible": True})
    check_fits_machine(path, read_sidecar(path), b"plan", "11.1.0", {"name": "NVIDIA L4", "sm": "8.9"})


BROKEN_SIDECARS = {
    "another schema": ({"schema": 2}, "schema is 2"),
    "another kind": ({"kind": "plan"}, "build the engine again"),
    "a key missing": ({"gpu": "DROP"}, "lacks gpu"),
    "gpu is null": ({"gpu": None}, "gpu is 'None'"),
    "gpu without sm": ({"gpu": {"name": "NVIDIA H100"}}, "gpu or precision is damaged"),
    "build is a list": ({"build": []}, r"build is '\[\]'"),
    "classes is a number": ({"classes": 5}, "classes is '5'"),
    "classes is true": ({"num_classes": True}, "num_classes is 'True'"),
    "batch lacks one": ({"batch": {"min": 1, "opt": 8}}, "batch, image_size, gpu or precision is damaged"),
    "batch upside down": ({"batch": {"min": 9, "opt": 8, "max": 8}}, "is damaged"),
    "one side": ({"image_size": [224]}, "is damaged"),
    "a precision of others": ({"precision": "int8"}, "is damaged"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN_SIDECARS.values(), ids=BROKEN_SIDECARS)
def test_sidecar_is_checked(engine, changes, message):
    path, write = engine
    write(**changes)
    with pytest.raises(ArtefactError, match=message):
        read_sidecar(path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100000])
def test_sidecar_of_nonsense_is_refused(engine, text):
    path, _ = engine
    sidecar_path(path).write_bytes(text)
    with pytest.raises(ArtefactError):
        read_sidecar(path)


def test_engine_without_sidecar(engine):
    path, _ = engine
    sidecar_path(path).unlink()
    with pytest.raises(ArtefactError, match="no sidecar"):
        read_sidecar(path)


@pytest.fixture
def no_tensorrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(engine_module, "_process", None)


def test_without_tensorrt_exit_code_3_says_what_works(no_tensorrt, tmp_path, capsys):
    out = tmp_path / "vim.engine"
    assert main(["export", "--model", "vim-t", "--weights", "random", "-o", str(out)]) == 3
    err = capsys.readouterr().err
    assert "TensorRT" in err
    assert "stm-export -o vim.onnx" in err
    assert not list(tmp_path.iterdir())


def test_without_a_driver_exit_code_3(monkeypatch):
    import ctypes

    def no_driver(name, *args, **kwargs):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_driver)
    with pytest.raises(MissingDependencyError, match="driver"):
        engine_module.require_gpu()


DRIVER = Driver("580.0", "13.0", (Gpu(0, "NVIDIA H100", 80 << 30, (9, 0)),))


@pytest.fixture
def machine(monkeypatch):
    """TensorRT and an H100 that are not there, and a plugin with code for `archs`; a Builder would fail the test."""

    def set_up(archs="80-real 120"):
        library = PluginLibrary("/opt/libstm_trt10.so", 10, 4, 2, "ab" * 32, {"archs": archs})
        owner = types.SimpleNamespace(trt=types.SimpleNamespace(__version__="10.6.0"), logger=types.SimpleNamespace(lines=[]))
        monkeypatch.setattr(engine_module, "driver", lambda with_version=True: DRIVER)
        monkeypatch.setattr(engine_module, "tensorrt_module", lambda: owner.trt)
        monkeypatch.setattr(engine_module, "load_plugin", lambda path=None: library)
        monkeypatch.setattr(engine_module, "process", lambda: owner)

    return set_up


@pytest.mark.parametrize(
    ("archs", "options", "sm"),
    [
        ("90-real", {}, 90),
        ("80 90", {}, 90),
        ("90a-real", {}, 90),
        ("80-real 120", {}, None),
        ("native", {}, None),
        ("90-real", {"hardware_compatible": True}, None),
    ],
)
def test_an_engine_is_lowered_for_the_gpu_that_the_plugin_has_kernels_for(machine, monkeypatch, archs, options, sm):
    machine(archs)
    monkeypatch.setattr(engine_module, "lower_tensorrt", lambda *arguments: arguments)
    options = BuildOptions(BatchProfile(1, 2, 4), fp16_accumulation=True, **options)
    assert engine_module.lower_for_engine("model", "fp16", options) == ("model", "fp16", True, 4, sm)


@pytest.mark.parametrize(("gpus", "sm"), [((), None), ((Gpu(0, "NVIDIA L4", 24 << 30, (8, 9)), *DRIVER.gpus), 89)], ids=["no GPU", "the first GPU"])
def test_without_hopper_no_plugin_is_asked(monkeypatch, gpus, sm):
    monkeypatch.setattr(engine_module, "driver", lambda with_version=True: Driver("580.0", "13.0", gpus))
    monkeypatch.setattr(engine_module, "lower_tensorrt", lambda *arguments: arguments[-1])
    assert engine_module.lower_for_engine("model", "fp16", BuildOptions()) == sm


def test_plugin_without_code_for_this_gpu_is_refused_before_the_build(machine, engine):
    machine("80-real 120")  # sm_80 machine code runs on 8.x only, PTX 120 on later ones
    with pytest.raises(PluginError, match=r"sm_80 sm_120 \+ PTX 120, but NVIDIA H100 is sm_90"):
        engine_module.build_engine(None, BuildOptions())
    with pytest.raises(PluginError, match="sm_90"):
        engine_module.load_engine(engine[0])


@pytest.mark.parametrize("archs", ["90-real", "", "native"], ids=["covered", "unknown", "native"])
def test_timing_cache_that_cannot_be_written_stops_before_the_build(machine, tmp_path, archs):
    machine(archs)
    with pytest.raises(ExportError, match="it is a folder"):
        engine_module.build_engine(None, BuildOptions(timing_cache=tmp_path))


@pytest.mark.parametrize("asked", [False, True])
def test_the_way_of_adding_up_goes_into_graph_and_sidecar(machine, monkeypatch, tmp_path, asked):
    machine()
    for name in ("require_tensorrt", "require_gpu", "require_torch_gpu", "load_plugin"):
        monkeypatch.setattr(deploy_module, name, lambda *_: None)
    seen = []

    def build(lowered, options, **_):
        seen.append((lowered, options))
        raise BuildError("enough")

    monkeypatch.setattr(deploy_module, "build_engine", build)
    with pytest.raises(BuildError, match="enough"):
        deploy_module.export("vim-n", tmp_path / "vim.engine", weights="random", build=BuildOptions(fp16_accumulation=asked))
    lowered, options = seen[0]
    assert ("Gemm" in {node.op_type for node in lowered.graph.node}) == asked
    monkeypatch.setattr(engine_module, "gpu", lambda: H100)
    library = types.SimpleNamespace(path=tmp_path / "libstm_trt10.so", sha256="0", kernel_version=5)
    sidecar = engine_module.make_sidecar(lowered, b"plan", options, engine_module.BuildInfo(1.0, 1.0, False, [], 1, 1), library, "fp16")
    assert engine_module.adds_up_in_fp16(sidecar) == asked


@pytest.mark.parametrize(("build", "precision", "wanted"), [({"fp16_accumulation": False}, "fp16", False), ({}, "fp16", True), (None, "bf16", False)])
def test_engines_of_before_add_up_in_fp16(build, precision, wanted):
    assert engine_module.adds_up_in_fp16({"build": build, "precision": precision}) == wanted


@pytest.mark.parametrize("asked", [False, True])
def test_an_engine_is_verified_and_timed_against_its_own_way_of_adding_up(monkeypatch, tmp_path, asked):
    """What `stm verify` lowers again, and the rivals that `stm bench` builds beside an engine file."""
    model = stm.create_model("vim-n", seed=0)
    config = model.config
    meta = {"model": "vim-n", "precision": "fp16", "image_size": [224, 224], "plan": None, "num_classes": config.num_classes, "seed": 0}
    meta |= {"weights": "random", "weights_random": True, "weights_sha256": stm.state_dict_sha256(model.state_dict()), "tensorrt": "10.6.0"}
    meta |= {"batch": {"min": 1, "opt": 1, "max": 1}, "build": {"fp16_accumulation": asked}}
    monkeypatch.setattr(verification_module, "load_engine", lambda path, library: ("engine", meta))
    monkeypatch.setattr(verification_module, "tensorrt_runner", lambda engine: None)
    monkeypatch.setattr(verification_module, "require_torch_gpu", lambda: None)
    seen = []
    monkeypatch.setattr("exporter.engine_parity.verify_engine", lambda engine, lowered, *_, **__: seen.append(lowered) or "report")
    assert verification_module.verify_file(tmp_path / "vim.engine") == "report"
    workshop = Workshop("cuda")
    monkeypatch.setattr(workshop, "_built", lambda lowered, name, batch: (seen.append(lowered), (None, 0, "fake"))[1])
    spec = Spec.from_metadata(meta, "vim")
    workshop.rival("unmerged", spec, 2)
    workshop.rival("engine@1", spec, 2)
    assert [("Gemm" in {node.op_type for node in lowered.graph.node}) for lowered in seen] == [asked] * 3
    workshop.rival("fp16-accumulation", spec, 2)
    assert "Gemm" in {node.op_type for node in seen[-1].graph.node}


def test_a_layer_that_tensorrt_named_is_told_by_its_onnx_node():
    text = json.dumps(
        {
            "Layers": [
                {"Name": "layers.0.norm.add_merge_norm", "LayerType": "PluginV3", "Metadata": "[ONNX Layer: layers.0.norm.add_merge_norm]"},
                {"Name": "__mye687_myl5_1", "LayerType": "gemm", "Metadata": "[ONNX Layer: layers.0.mixer.in_proj/MatMul]\u001f[ONNX Layer: a/Cast]"},
                {"Name": "dummy_shape_call", "LayerType": "shape_call", "Metadata": ""},
            ]
        }
    )
    inspector = types.SimpleNamespace(get_engine_information=lambda form: text)
    engine = types.SimpleNamespace(create_engine_inspector=lambda: inspector)
    trt = types.SimpleNamespace(LayerInformationFormat=types.SimpleNamespace(JSON=0))
    lines = [inspection_module._layer_line(layer) for layer in engine_module.engine_layers(engine, trt)]
    assert [line.split() for line in lines] == [
        ["ours", "PluginV3", "layers.0.norm.add_merge_norm"],
        ["TensorRT", "gemm", "__mye687_myl5_1", "of", "layers.0.mixer.in_proj/MatMul"],
        ["TensorRT", "shape_call", "dummy_shape_call"],
    ]


def test_without_a_home_there_is_no_timing_cache(machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert engine_module.default_timing_cache() == tmp_path / "stm" / "timing-trt10.6.0-sm9.0.cache"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"no timing cache \(cannot write .*not a folder\)"):
        assert engine_module.default_timing_cache() is None


@pytest.mark.parametrize(("cuda", "words"), [(None, "a CPU build"), ("14.1", "built for CUDA 14.1, the driver runs CUDA up to 13.0")])
def test_torch_that_cannot_use_the_gpu_is_told_before_a_build(machine, monkeypatch, cuda, words):
    machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(MissingDependencyError, match=words) as caught:
        engine_module.require_torch_gpu()
    assert caught.value.exit_code == 3


USAGE = {
    "batch for onnx": ["--batch", "1:8:128", "-o", "vim.onnx"],
    "precision for onnx": ["--precision", "fp16", "-o", "vim.onnx"],
    "suffix": ["-o", "vim.trt"],
    "batch spelled wrong, told before TensorRT is missed": ["--batch", "1:8", "-o", "vim.engine"],
    "an engine's option for onnx": ["--refit", "-o", "vim.onnx"],
    "fp16's sums for onnx": ["--fp16-accumulation", "-o", "vim.onnx"],
    "fp16's sums for bf16, told before TensorRT is missed": ["--fp16-accumulation", "--precision", "bf16", "-o", "vim.engine"],
}


@pytest.mark.parametrize("arguments", USAGE.values(), ids=USAGE)
def test_usage_errors(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", "vim-t", "--weights", "random", *arguments]) == 2
    assert not list(tmp_path.iterdir())


def test_an_old_tensorrt_is_named_with_what_is_needed(monkeypatch):
    monkeypatch.setattr(engine_module, "tensorrt_module", lambda: types.SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(MissingDependencyError, match=r"TensorRT 8\.6\.1 is too old; we need 10\.6 or later.*What works here"):
        engine_module.require_tensorrt()
    monkeypatch.setattr(engine_module, "tensorrt_module", lambda: types.SimpleNamespace(__version__="10.6.0"))
    assert engine_module.require_tensorrt().__version__ == "10.6.0"
