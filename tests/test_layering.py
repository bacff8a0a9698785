"""Who imports whom: stm torch alone, exporter -> stm, kernels CUDA and CUB alone; importing starts nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STM = sorted((ROOT / "stm").rglob("*.py"))
EXPORTER = sorted((ROOT / "exporter").rglob("*.py"))
KERNELS = sorted(path for path in (ROOT / "plugins" / "kernels").rglob("*") if path.suffix in (".h", ".cuh", ".cu"))
WRAPPERS = sorted(path for path in (ROOT / "plugins").rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
INSIDE_FUNCTIONS = {"safetensors", "huggingface_hub"}


def imported(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(top-level package, whether only a function imports it); relative imports are the package's own."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0], inside
        yield from imported(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def imports(path: Path) -> set[tuple[str, bool]]:
    return set(imported(ast.parse(path.read_text(encoding="utf-8"))))


def test_the_tree_is_where_these_tests_look() -> None:
    assert len(STM) > 5
    assert len(EXPORTER) > 5
    assert len(KERNELS) > 5


@pytest.mark.parametrize("path", STM, ids=lambda path: path.name)
def test_stm_imports_torch_alone(path: Path) -> None:
    for package, inside in imports(path):
        allowed = package in sys.stdlib_module_names or package in ("torch", "stm") or (inside and package in INSIDE_FUNCTIONS)
        assert allowed, f"{path} imports {package}{' in a function' if inside else ''}"


def test_stm_never_reaches_above_itself() -> None:
    for path in STM:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path}: a relative import leaves the package"


def test_the_exporter_stands_on_stm_and_on_no_official_mamba() -> None:
    packages = {package for path in EXPORTER for package, _ in imports(path)}
    assert "stm" in packages
    assert not packages & {"tests", "samples", "mamba_ssm", "causal_conv1d", "timm"}


_STD = re.compile(r"^[a-z_]+$|^(float|limits|math|stdint|stddef|stdio|stdlib|string)\.h$")


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_include_cuda_cub_and_themselves(path: Path) -> None:
    own = {other.name for other in KERNELS}
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.M):
        if bracket == '"':
            assert Path(name).name in own, f"{path.name} includes {name}"
        else:
            assert name.startswith(("cuda", "cub/", "mma.h", "cooperative_groups")) or _STD.match(name), f"{path.name} includes <{name}>"


def test_kernels_name_no_framework() -> None:
    for path in KERNELS:
        assert not re.search(r"\b(nvinfer1|NvInfer|onnxruntime|Ort[A-Z]\w+|at::Tensor|torch::)", path.read_text(encoding="utf-8")), path


def test_trt_and_ort_wrappers_do_not_include_each_other() -> None:
    for path in WRAPPERS:
        text = path.read_text(encoding="utf-8")
        if "trt" in path.relative_to(ROOT).parts:
            assert not re.search(r"#\s*include.*onnxruntime", text), path
        if "ort" in path.relative_to(ROOT).parts:
            assert not re.search(r"#\s*include.*NvInfer", text), path


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_stm_brings_torch_alone_and_starts_no_cuda() -> None:
    watched = "numpy onnx onnxruntime onnx_graphsurgeon onnxscript polygraphy PIL matplotlib tqdm safetensors huggingface_hub exporter tensorrt"
    code = f"""
import sys, torch
before = set(sys.modules)
import stm
for name in stm.__all__:
    getattr(stm, name)  # they may be imported on demand
new = {{name.partition('.')[0] for name in set(sys.modules) - before}}
print(sorted(new & set({watched.split()!r})), torch.cuda.is_initialized())
"""
    assert run(code) == "[] False"


def test_importing_exporter_starts_no_cuda_and_no_tensorrt() -> None:
    code = "import sys, torch, exporter, exporter.cli, exporter.verification; print(torch.cuda.is_initialized(), 'tensorrt' in sys.modules)"
    assert run(code) == "False False"


def test_the_command_line_answers_without_torch() -> None:
    heavy = "('torch', 'onnx', 'onnxruntime', 'matplotlib', 'polygraphy')"
    assert run(f"import sys, exporter.cli; print([name for name in {heavy} if name in sys.modules])") == "[]"
