"""Builds the TensorRT plugin libraries into the package where nvcc and TensorRT's headers are found (exporter/plugin_build.py).

Everything else is in pyproject.toml. STM_BUILD_PLUGINS=0 skips the libraries, =1 makes a failure an error.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent


def _load(path: str) -> ModuleType:
    """A module by its file: `import exporter` needs torch, which an isolated build has not."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


plugin_build = _load("exporter/plugin_build.py")


class BuildPlugins(Command):
    """Build sub-command: kernel and plugin libraries into exporter/lib."""

    description = "build the TensorRT plugin libraries"
    user_options = []  # noqa: RUF012
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.build_base: str | None = None
        self.built = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_base", "build_base"))

    def _output(self) -> Path:
        package = ROOT if self.editable_mode else Path(str(self.build_lib))
        return package / "exporter" / plugin_build.LIBRARY_FOLDER

    def run(self) -> None:
        work = ROOT / str(self.build_base) / "cmake"
        info = plugin_build.build_plugins(ROOT, self._output(), work, self.distribution.get_version())
        self.built = info.status == "built"

    def get_source_files(self) -> list[str]:
        """For the sdist, so that it can build them too."""
        files = [ROOT / "CMakeLists.txt", *sorted(path for path in (ROOT / "plugins").rglob("*") if path.is_file())]
        return [str(path.relative_to(ROOT)) for path in files]

    def get_outputs(self) -> list[str]:
        return [] if self.editable_mode else [str(path) for path in self._output().rglob("*") if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """Adds the plugins; starts clean, so that no file of an earlier build slips into a wheel."""

    sub_commands = [*build.sub_commands, ("build_plugins", None)]  # noqa: RUF012

    def run(self) -> None:
        if Path(str(self.build_lib)).resolve().is_relative_to(ROOT / "build" / "python"):  # never a --build-lib of the user's
            shutil.rmtree(str(self.build_lib), ignore_errors=True)
        super().run()


class BdistWheel(bdist_wheel):
    """py3-none-any without libraries; with them py3-none-<platform>: any Python 3, one platform."""

    def run(self) -> None:
        if not self.skip_build:
            self.run_command("build")
        if self.get_finalized_command("build_plugins").built:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # for `install`: all files at the wheel's root
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def _tools() -> list[str]:
    """Build tools to fetch into an isolated build: only where there is something to build and the machine has none."""
    try:
        wanted = plugin_build.build_mode() != "0" and plugin_build.find_nvcc() and plugin_build.find_headers()
    except plugin_build.PluginBuildError:
        return []  # told when it is built
    if not wanted:
        return []
    cmake = [] if plugin_build.find_tool("cmake", plugin_build.MIN_CMAKE) else ["cmake>=3.24"]
    ninja = [] if plugin_build.find_tool("ninja") or plugin_build.find_tool("make") else ["ninja"]
    return cmake + ninja


setup(
    cmdclass={"build": Build, "build_plugins": BuildPlugins, "bdist_wheel": BdistWheel},
    # CMake's own build folder is build/, and its build/lib would be taken for Python files.
    options={"build": {"build_base": "build/python"}},
    setup_requires=_tools(),
)
