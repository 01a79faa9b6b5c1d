"""Builds stub CUDA libraries for onnxruntime-gpu: `python -m tests.gpu.build_stub HEADERS OUT`.

HEADERS is the folder with CUDA's driver_types.h (in the wheel nvidia-cuda-runtime). The libraries
export what onnxruntime's CUDA provider imports: the functions of `stub.c`, and for all others one
that returns success; and NVIDIA's driver library (`nvml.c`). Load them with LD_LIBRARY_PATH=OUT.
Needs Linux, gcc and nm.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

SOURCES = {  # the others only return success
    "libcudart": Path(__file__).with_name("stub.c"),
    "libnvidia-ml": Path(__file__).with_name("nvml.c"),
}
# Loaded by name, whatever the provider imports from them.
ALWAYS: dict[str, list[str]] = {
    "libcurand.so.10": [],
    "libcuda.so.1": ["cuTensorMapEncodeTiled"],
    "libnvidia-ml.so.1": [],
}


def build(headers: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    libraries = {**imports(provider()), **ALWAYS}
    runtime = next(name for name in libraries if name.startswith("libcudart"))
    for library in sorted(libraries, key=lambda name: name != runtime):  # others count with it
        functions = libraries[library]
        own = SOURCES.get(library.partition(".")[0])
        code = "void stub_gemm(void);\n" if own is None else own.read_text(encoding="utf-8")
        missing = [name for name in functions if not re.search(rf"\b{name}\(", code)]
        code += "".join(map(body, missing))
        source = out / f"{library}.c"
        source.write_text(code, encoding="utf-8")
        options = ["-O1", "-w", "-shared", "-fPIC", "-I", headers, f"-Wl,-soname,{library}"]
        if functions and library not in ALWAYS:  # the provider imports versioned symbols
            versions = out / f"{library}.map"
            versions.write_text(f"{library} {{ global: *; }};\n", encoding="utf-8")
            options.append(f"-Wl,--version-script={versions}")
        counting = [out / runtime] if library.startswith("libcublas") else []
        subprocess.run(["gcc", *options, "-o", out / library, source, *counting], check=True)


def provider() -> Path:
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("there is no onnxruntime")
    path = Path(spec.origin).with_name("capi") / "libonnxruntime_providers_cuda.so"
    if not path.exists():
        raise SystemExit("this onnxruntime is not onnxruntime-gpu")
    return path


def imports(library: Path) -> dict[str, list[str]]:
    """Library -> functions of CUDA that a shared library imports."""
    command = ["nm", "-D", "--undefined-only", library]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        function, _, origin = name.partition("@")
        if origin.startswith("libcu"):
            found[origin].append(function)
    return found


def body(function: str) -> str:
    """A function that does nothing, in C."""
    if re.fullmatch(r"cublas(Lt)?Create(_v2)?", function):
        return f"int {function}(void **h) {{ static long any[64]; *h = any; return 0; }}\n"
    if function.endswith(("StatusName", "StatusString")):
        return f'const char *{function}(int status) {{ return "stub"; }}\n'
    if function == "cublasLtMatmulAlgoGetHeuristic":
        parameters = "void *a, void *b, void *c, void *d, void *e, void *f, void *g, int n, void *r"
        return f"int {function}({parameters}, int *found) {{ *found = 0; return 0; }}\n"
    if re.search(r"gemm|Matmul$", function, re.IGNORECASE):
        return f"int {function}(void) {{ stub_gemm(); return 0; }}\n"
    return f"int {function}(void) {{ return 0; }}\n"


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
