"""Small libraries with the names and behaviour of NVML and CUPTI, compiled for the tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compiled(source: str, folder: Path, *options: str) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in library with")
    library = folder / f"lib{Path(source).stem}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", *options, "-o", str(library), str(HERE / source)], check=True)
    return str(library)


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled("fake_nvml.c", tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def fake_cupti(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled("fake_cupti.c", tmp_path_factory.mktemp("cupti"))
