"""doctor on machines that are not there: each is a set of stand-ins, so the answers do not depend on the machine of the test."""

import importlib
import json
import subprocess
import sys
import types

import pytest
import torch

from exporter import doctor as doctor_module
from exporter import gpus, libraries, plugin_build
from exporter.cli import main
from exporter.doctor import MISSING, OK, PROBLEM, doctor
from exporter.errors import PluginError
from exporter.gpus import Driver, Gpu
from stm.errors import MissingDependencyError

from .test_libraries import ALL_ARCHS

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 80 << 30, (9, 0))
T4 = Gpu(1, "Tesla T4", 15 << 30, (7, 5))
LIBRARY = libraries.PluginLibrary(plugin_build.Path("/opt/libstm_trt10.so"), 10, 3, 1, "ab" * 32, {"tensorrt": "10.6.0", "archs": ALL_ARCHS})


@pytest.fixture
def machine(monkeypatch):
    """Sets up a machine; by default one on which everything works."""

    def set_up(tensorrt="10.6.0", builder=True, gpu=(H100,), plugin=LIBRARY, broken=(), torch_cuda="13.2"):
        trt = types.SimpleNamespace(__version__=tensorrt, **({"Builder": object} if builder else {}))

        def tensorrt_module(name="tensorrt"):
            if tensorrt is None:
                raise MissingDependencyError("TensorRT is not installed: no module tensorrt. Get it with `pip install tensorrt`.")
            return trt

        def load_plugin(tensorrt=None):
            if isinstance(plugin, Exception):
                raise plugin
            return plugin

        def import_module(name, original=importlib.import_module):
            if name in broken:
                raise OSError(f"lib{name}.so: undefined symbol\nand more")
            return original(name)

        driver = Driver("580.0", "13.0", tuple(gpu)) if gpu else Driver(problem="no usable NVIDIA driver (libcuda.so.1)")
        monkeypatch.setattr(gpus, "driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(libraries, "tensorrt_module", tensorrt_module)
        monkeypatch.setattr(libraries, "load_plugin", load_plugin)
        monkeypatch.setattr(doctor_module.importlib, "import_module", import_module)
        if isinstance(plugin, Exception):
            monkeypatch.setattr(libraries, "find_plugin", lambda major: load_plugin())

    return set_up


def row(report, name):
    return next(row for row in report.rows if row.name == name)


def test_everything_there(machine):
    machine()
    report = doctor()
    assert row(report, "TensorRT").status == row(report, "plugin").status == row(report, "plugin on GPU 0").status == OK
    assert row(report, "GPU 0").value == "NVIDIA H100 80GB HBM3, 80 GiB, sm_90"
    assert all(report.works(name) for name in ("export .onnx", "build engine", "run engine", "samples, ONNX", "samples, Python engine"))
    assert report.exit_code(require_gpu=True) == 0
    assert report.to_dict()["gpus"][0]["sm"] == 90
    assert report.to_dict()["plugin"]["tensorrt_major"] == 10


def test_nothing_but_python_packages(machine):
    machine(tensorrt=None, gpu=(), plugin=MissingDependencyError("no plugin library. Build it with pip."))
    report = doctor()
    for name in ("TensorRT", "driver", "plugin"):
        assert row(report, name).status == MISSING
        assert row(report, name).todo
    assert report.works("export .onnx")
    assert not report.works("build engine")
    assert not report.works("run engine")
    assert report.exit_code() == 0
    assert report.exit_code(require_gpu=True) == 3
    assert report.to_dict()["why_not"]["run engine"] == "needs TensorRT, a GPU, the plugin"


@pytest.mark.parametrize(
    ("change", "name", "words", "lost"),
    [
        ({"tensorrt": "10.3.0"}, "TensorRT", "10.6 or later", set()),
        ({"builder": False}, "TensorRT", "without a builder", {"build engine"}),
        ({"plugin": PluginError("/x.so is for TensorRT 11. Give another.")}, "plugin", "for TensorRT 11", {"build engine", "run engine"}),
        ({"gpu": (T4,)}, "plugin on GPU 1", "Tesla T4 is sm_75", {"build engine", "run engine"}),
        ({"gpu": (H100, T4)}, "plugin on GPU 1", "Tesla T4 is sm_75", set()),
        (
            {"broken": ("onnxruntime",)},
            "onnxruntime",
            "OSError: libonnxruntime.so: undefined symbol",
            {"export .onnx", "build engine", "samples, ONNX"},
        ),
        ({"broken": ("onnx_graphsurgeon",)}, "onnx-graphsurgeon", "undefined symbol", {"build engine"}),
        ({"torch_cuda": None}, "torch on the GPU", "a CPU build", {"build engine", "samples, Python engine"}),
        ({"torch_cuda": "14.1"}, "torch on the GPU", "CUDA 14.1, the driver runs CUDA up to 13.0", {"build engine", "samples, Python engine"}),
    ],
    ids=["old TensorRT", "lean", "other major", "uncovered GPU", "one covered", "onnxruntime broken", "surgeon broken", "CPU torch", "new torch"],
)
def test_a_problem_is_told_with_the_mend(machine, change, name, words, lost):
    machine(**change)
    report = doctor()
    found = row(report, name)
    assert found.status == PROBLEM
    assert words in found.value
    assert found.todo
    named = ("export .onnx", "build engine", "run engine", "samples, ONNX", *(["samples, Python engine"] if "torch_cuda" in change else []))
    assert {name for name in named if not report.works(name)} == lost
    assert report.exit_code() == (3 if "export .onnx" in lost else 0)


def test_what_the_installation_skipped_is_shown(machine, monkeypatch, tmp_path):
    machine()
    monkeypatch.setattr(libraries, "PACKAGE_FOLDER", tmp_path)
    plugin_build.PluginBuild("skipped", "TensorRT plugins skipped: no nvcc").save(tmp_path)
    found = row(doctor(), "plugin build")
    assert (found.status, found.value) == (MISSING, "TensorRT plugins skipped: no nvcc")


def test_command_prints_a_table(machine, capsys):
    machine(tensorrt=None, gpu=())
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "missing  TensorRT" in out
    assert "-> Get it with" in out
    assert "what works here:" in out
    assert main(["doctor", "--require-gpu"]) == 3


def test_command_prints_json(machine, capsys):
    machine(gpu=())
    assert main(["doctor", "--json", "--require-gpu"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 3
    assert answer["works"]["export .onnx"] is True
    assert {"name", "status", "value", "todo"} == set(answer["rows"][0])


def test_starts_no_cuda_and_makes_no_builder():
    """On the real machine, in a process of its own: a Builder without a driver would abort it."""
    code = """
import sys
from exporter.doctor import doctor
report = doctor()
import torch
assert not torch.cuda.is_initialized()
assert report.works("export .onnx"), report.lines()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_driver_never_raises(monkeypatch):
    monkeypatch.setattr(gpus, "_LIBCUDA", "libcuda_that_nobody_has.so.1")
    machine = gpus.driver()
    assert machine.gpus == ()
    assert "no usable NVIDIA driver" in machine.problem
