"""Runs tests with the recorder built under a sanitizer.

python -m tests.sanitized address,undefined [pytest arguments]
python -m tests.sanitized thread [pytest arguments]

The sanitized module is built beside the usual one and takes its name in the process that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "sanitizer-logs"
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
# What touches the compiled code; the rest of tests/record is Python.
OWN = [f"tests/record/test_{name}.py" for name in ("activity_recorder", "recorder_life", "nvml_sampler")]
_OPTIONS = {
    # Python and PyTorch keep what they allocate until the process ends; leaks of ours have a test of their own.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    # PyTorch and Python are not built for it and have reports of their own: ours are looked for among all.
    "TSAN_OPTIONS": f"halt_on_error=0:exitcode=0:log_path={LOGS / 'tsan'}",
}
_RUN = """
import importlib.util, sys
import llmkern
spec = importlib.util.spec_from_file_location("llmkern._recorder", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["llmkern._recorder"] = llmkern._recorder = module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def built(kinds: str) -> Path:
    """Build the recorder under the sanitizers *kinds* and return the module's file."""
    folder = ROOT / "build" / f"sanitize-{kinds.replace(',', '-')}"
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DSANITIZE={kinds}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'module'}"),
    ]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return next((folder / "module").glob("_recorder*.so"))


def main() -> None:
    kinds, arguments = sys.argv[1], sys.argv[2:]
    arguments += [] if any(a.startswith("tests") for a in arguments) else OWN
    module = built(kinds)
    compiler = shutil.which("c++") or "g++"
    names = [RUNTIMES[kind] for kind in kinds.split(",")]
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    preload = {"LD_PRELOAD": " ".join(found), **_OPTIONS}
    # A sanitizer that maps memory at fixed places cannot do with random ones.
    fixed = ["setarch", "-R"] if "thread" in kinds and shutil.which("setarch") else []
    python = [*fixed, sys.executable, "-c", _RUN, str(module), "-p", "no:cacheprovider", *arguments]
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    code = subprocess.run(python, cwd=ROOT, env=os.environ | preload, check=False).returncode
    reports = [part for log in LOGS.iterdir() for part in log.read_text(errors="replace").split("=" * 18)]
    ours = [report for report in reports if "_recorder" in report or "llmkern::" in report]
    print(f"{kinds}: tests ended with {code}, {len(ours)} reports of the recorder's own code")
    print("\n".join(ours[:3]))
    sys.exit(code or bool(ours))


if __name__ == "__main__":
    main()
