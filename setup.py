# SPDX-License-Identifier: BSD-3-Clause
"""Drives CMakeLists.txt, which is the only build description, and packs what it makes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Both libraries come from one CMake run; setuptools only learns where they lie."""

    def run(self):
        try:
            import torch
        except ImportError as error:
            raise SystemExit(
                "dcd_kernels needs torch while it is built: install torch first, then\n"
                "    pip install --no-build-isolation ."
            ) from error
        source = Path(__file__).resolve().parent
        build = source / self.build_temp
        package = (source / "dcd_kernels") if self.inplace else Path(self.build_lib) / "dcd_kernels"
        package.mkdir(parents=True, exist_ok=True)
        configure = [
            shutil.which("cmake") or "cmake",
            f"-S{source}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDCD_TORCH_ROOT={Path(torch.__file__).resolve().parent}",
            f"-DDCD_VERSION={self.distribution.get_version()}",
            f"-DCMAKE_INSTALL_PREFIX={package.resolve()}",
        ]
        if shutil.which("ninja"):
            configure.append("-GNinja")
        # e.g. DCD_CMAKE_ARGS="-DDCD_SANITIZE=address,undefined"
        configure += os.environ.get("DCD_CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        subprocess.run([configure[0], "--build", str(build), "--parallel"], check=True)
        subprocess.run([configure[0], "--install", str(build)], check=True)

    def get_outputs(self):
        package = Path(self.build_lib) / "dcd_kernels"
        return [str(path) for path in package.glob("_*.so")]


setup(ext_modules=[Extension("dcd_kernels._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
