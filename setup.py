"""Builds the recorder extension through CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    """Configures and builds csrc/ and leaves the module where setuptools wants it."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve() / extension.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        for command in (configure, ["cmake", "--build", str(build), "--parallel"]):
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(
                    f"llmkern: building the recorder failed at '{' '.join(command[:2])}'; the reason is above."
                )


setup(ext_modules=[Extension("llmkern._recorder", sources=[])], cmdclass={"build_ext": CMakeBuild})
