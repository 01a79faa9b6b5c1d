"""onnxruntime's execution providers: which can be used on this machine, and if not, why not."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from functools import cache
from typing import Any

import onnxruntime as ort

from dlp_edge.errors import DeviceError, DeviceMemoryError
from dlp_edge.runtime.engine.nvidia import Gpu, find_gpu

PROVIDERS = {
    "cuda": "CUDAExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "cpu": "CPUExecutionProvider",
}  # in the order of preference
_REGISTERED = "dlp_edge.webgpu"
# Of CUDA, in the order of loading. The provider itself names only the first that is missing.
_CUDA_LIBRARIES = {
    "cudart": "nvidia-cuda-runtime",
    "cublasLt": "nvidia-cublas",
    "curand": "nvidia-curand",
}
_OWN_VERSIONS = {"curand": 10}  # the others have CUDA's
_CUDA_CONTEXT = 500 << 20  # bytes that CUDA and onnxruntime take beside the tensors; not measured


def check_provider(kind: str, needed: int = 0) -> str:
    """Check that a device can be used; returns what is known of it, for people.

    Args:
        needed: bytes of device memory that the bundle takes.

    Raises:
        DeviceError: it cannot.
        DeviceMemoryError: its free memory is too small.
    """
    if kind == "cuda":
        return _check_cuda(needed)
    if kind == "webgpu":
        return _check_webgpu()
    return ""


def _check_cuda(needed: int) -> str:
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise DeviceError(
            f"this onnxruntime has no {PROVIDERS['cuda']}",
            "Install dlp-edge[cuda] instead of dlp-edge[cpu], in an environment of its own",
        )
    gpu = find_gpu()
    if gpu is None:
        raise DeviceError(
            "there is no NVIDIA GPU, or no driver for it",
            "Install NVIDIA's driver (nvidia-smi shows it), or use the CPU",
        )
    release = str(ort.cuda_version)
    major = int(release.partition(".")[0] or 0)
    if gpu.cuda[0] < major:
        raise DeviceError(
            f"the driver {gpu.driver} supports CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, this "
            f"onnxruntime needs CUDA {major}",
            "Update NVIDIA's driver, or install an onnxruntime-gpu for the older CUDA",
        )
    _check_libraries(major)
    if needed and needed + _CUDA_CONTEXT > gpu.free:
        raise DeviceMemoryError(
            f"the bundle takes {(needed + _CUDA_CONTEXT) / 1e9:.1f} GB on the GPU, "
            f"{gpu.free / 1e9:.1f} of {gpu.total / 1e9:.1f} GB are free",
            "Close other programs, use a smaller max_context or format, or the CPU",
        )
    return _described(gpu)


def _described(gpu: Gpu) -> str:
    return f"{gpu.name}, driver {gpu.driver}"


def _check_libraries(major: int) -> None:
    """Load CUDA's libraries, from NVIDIA's wheels if they are installed."""
    # It prints what it misses; below that is an error.
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls(cudnn=False)
    for name, wheel in _CUDA_LIBRARIES.items():
        version = _OWN_VERSIONS.get(name, major)
        file = f"{name}64_{version}.dll" if sys.platform == "win32" else f"lib{name}.so.{version}"
        try:
            ctypes.CDLL(file)
        except OSError as error:
            raise DeviceError(
                f"CUDA's library {file} is missing",
                f'Run: pip install "{wheel}=={version}.*", or install the CUDA toolkit {major}',
            ) from error


def _check_webgpu() -> str:
    devices = webgpu_devices()
    if not devices:
        raise DeviceError(
            "onnxruntime's WebGPU provider found no GPU",
            "Install the GPU's driver (Vulkan on Linux), or use the CPU",
        )
    return str(devices[0].device.vendor)


@cache
def webgpu_devices() -> list[Any]:
    """The devices of onnxruntime's WebGPU plugin.

    Raises:
        DeviceError: the plugin is missing or does not load.
    """
    try:
        import onnxruntime_ep_webgpu as plugin
    except ImportError as error:
        raise DeviceError(
            "onnxruntime's WebGPU provider is not installed",
            "Run: pip install onnxruntime-ep-webgpu (the extra dlp-edge[webgpu])",
        ) from error
    try:
        ort.register_execution_provider_library(_REGISTERED, plugin.get_library_path())
        found = [d for d in ort.get_ep_devices() if d.ep_name == plugin.get_ep_name()]
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise DeviceError(
            f"onnxruntime's WebGPU provider does not load ({error})",
            "Update onnxruntime and onnxruntime-ep-webgpu",
        ) from error
    return found[:1]
