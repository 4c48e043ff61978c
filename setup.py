# SPDX-License-Identifier: Apache-2.0
"""Builds spmd_engine._C with CMake. Everything else is in pyproject.toml.

Environment: SPMD_ENGINE_CUDA (AUTO, ON, OFF), SPMD_ENGINE_CUDA_ARCHS (such as "90" or "80,90"), CMAKE_ARGS.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def cmake_command() -> list[str]:
    if importlib.util.find_spec("cmake.__main__"):
        return [sys.executable, "-m", "cmake"]
    found = shutil.which("cmake")
    if found is None:
        raise RuntimeError("no CMake found: pip install 'cmake>=3.26'")
    return [found]


def ninja_path() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.exists():
            return str(bundled)
    found = shutil.which("ninja")
    if found is None:
        raise RuntimeError("no Ninja found: pip install ninja")
    return found


class CMakeBuild(build_ext):
    """Lets CMake build the extension and put it where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        arguments = [
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja_path()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPMD_ENGINE_CUDA={os.environ.get('SPMD_ENGINE_CUDA', 'AUTO').upper()}",
        ]
        archs = os.environ.get("SPMD_ENGINE_CUDA_ARCHS", "")
        if archs:
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs.replace(',', ';')}")
        arguments += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        cmake = cmake_command()
        subprocess.run([*cmake, "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        subprocess.run([*cmake, "--build", str(build), *jobs], check=True)


def native_files(*suffixes: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)


setup(
    ext_modules=[
        Extension(
            "spmd_engine._C",
            sources=native_files(".cpp", ".cu"),
            depends=["CMakeLists.txt", *native_files(".hpp", ".cuh")],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
