"""Choose the execution provider, open sessions on it, and fail if onnxruntime falls back."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import onnxruntime as ort

from dlp_edge.bundle.weight_file import Weights
from dlp_edge.errors import BundleError, DeviceError, DlpEdgeError, UsageError
from dlp_edge.native_calls import native_calls
from dlp_edge.runtime.engine.operators import PLAIN_OPERATORS, operators
from dlp_edge.runtime.engine.ort_errors import first_line, is_out_of_memory, out_of_memory
from dlp_edge.runtime.engine.providers import PROVIDERS, check_provider, webgpu_devices

_log = logging.getLogger(__name__)

CUDA_GRAPHS_VARIABLE = "DLP_EDGE_CUDA_GRAPHS"  # 0 disables them
_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Device:
    """Where the backbone runs.

    Attributes:
        kind: "cpu", "cuda" or "webgpu".
        threads: intra-op threads of a session.
        operators: the custom operators' library, if it can be used.
        kernels: what multiplies quantised matrices, for people.
        cuda_graphs: whether decode steps are captured as CUDA graphs.
        name: the GPU, for people.
        reason: why it was chosen over the bundle's other targets; "" if there was no choice.
    """

    kind: str
    threads: int
    operators: Path | None = None
    kernels: str = PLAIN_OPERATORS
    cuda_graphs: bool = False
    name: str = ""
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == "cpu":
            return f"cpu ({self.threads} threads, {self.kernels})"
        experimental = ", experimental" if self.kind == "webgpu" else ""
        return f"{self.kind} ({self.name}{experimental})"

    def without_operators(self) -> Device:
        """The same device for a graph that has no quantised matrices."""
        return replace(self, operators=None, kernels=PLAIN_OPERATORS)


def choose_device(requested: str, target: str, threads: int | None, needed: int = 0) -> Device:
    """Choose the device for a bundle.

    "auto" is the first of cuda, webgpu and cpu that the bundle is for, that this machine has, and
    that has enough memory.

    Args:
        target: what the bundle was exported for: "cpu", "cuda", "webgpu", or several, joined by
            commas.
        needed: bytes that the bundle takes in a GPU's memory.

    Raises:
        UsageError: `requested` is no device, or threads < 1.
        DeviceError: the bundle was exported for another device, or this machine has none that it
            was exported for. The error is that of the last device tried.
    """
    if requested not in ("auto", *PROVIDERS):
        raise UsageError(f"unknown device {requested!r}", f"Use auto, {' or '.join(PROVIDERS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}", "Choose at least 1")
    targets = target.split(",")
    if requested not in ("auto", *targets):
        raise DeviceError(
            f"the bundle was exported for {' and '.join(targets)}, not for {requested}",
            f"Export it with --target {requested}, or use device={targets[0]!r}",
        )
    wanted = [kind for kind in PROVIDERS if kind in targets] if requested == "auto" else [requested]
    reasons: list[str] = []
    for kind in wanted:
        try:
            name = check_provider(kind, needed)
        except DeviceError as error:
            if kind == wanted[-1]:
                raise
            reasons.append(f"not {kind}: {error.cause}")
        else:
            return _device(kind, threads or _default_threads(), name, "; ".join(reasons))
    raise AssertionError  # the loop returns or raises


def fallback_device(requested: str, failed: Device, target: str, error: DlpEdgeError) -> Device:
    """The CPU, in place of a device that turned out not to work.

    Raises:
        DlpEdgeError: the one given, if that device was asked for or the bundle is not for the CPU.
    """
    if requested != "auto" or failed.kind == "cpu" or "cpu" not in target.split(","):
        raise error
    _log.warning("%s: %s. The CPU takes over.", failed, error.cause)
    reasons = [failed.reason, f"not {failed.kind}: {error.cause}"]
    return _device("cpu", failed.threads, "", "; ".join(filter(None, reasons)))


def _device(kind: str, threads: int, name: str, reason: str) -> Device:
    if kind == "cpu":
        found = operators()
        return Device(kind, threads, found.library, found.kernels, reason=reason)
    graphs = kind == "cuda" and os.environ.get(CUDA_GRAPHS_VARIABLE) != "0"
    return Device(kind, threads, cuda_graphs=graphs, name=name, reason=reason)


def open_session(
    model: bytes,
    device: Device,
    weights: Weights | None = None,
    folder: Path | None = None,
    capture: bool = False,
) -> ort.InferenceSession:
    """Open an inference session on the device.

    Args:
        model: the ONNX graph's bytes.
        weights: the graph's external tensors by name; onnxruntime then opens no file.
        folder: the folder of the external data files. Given with `weights`, the session uses
            the arrays in place instead of copying them; they must outlive it.
        capture: capture passes as CUDA graphs, if the provider runs all nodes.

    Raises:
        BundleError: onnxruntime cannot load the graph.
        DeviceError: onnxruntime fell back to another provider.
        MemoryError, DeviceMemoryError: not enough memory.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # 100 us bridge the gaps between nodes; between passes, which are longer, the threads sleep and
    # leave the cores to Python and to other sessions.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    provider = PROVIDERS[device.kind]
    if folder is not None:
        options.add_session_config_entry(_FOLDER, str(folder))
    try:
        if device.operators is not None:
            options.register_custom_ops_library(str(device.operators))
        values = {n: ort.OrtValue.ortvalue_from_numpy(w) for n, w in (weights or {}).items()}
        if folder is None:
            options.add_external_initializers(list(values), list(values.values()))
        else:
            for name, value in values.items():
                options.add_initializer(name, value)
        in_place = bool(values) and folder is not None
        with native_calls:
            session = _open(model, options, provider, capture, in_place)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        if is_out_of_memory(error):
            raise out_of_memory(error, device.kind) from error
        raise BundleError(
            f"onnxruntime cannot load the graph ({first_line(error)})", "Export the bundle again"
        ) from error
    if session.get_providers()[0] != provider:
        raise DeviceError(
            f"onnxruntime runs the model on {session.get_providers()[0]}, not on {provider}",
            "Check the GPU's driver and the libraries that onnxruntime needs for it",
        )
    return session


def _open(
    model: bytes, options: ort.SessionOptions, provider: str, capture: bool, in_place: bool
) -> ort.InferenceSession:
    if provider == PROVIDERS["webgpu"]:
        options.add_provider_for_devices(webgpu_devices(), {})
        return ort.InferenceSession(model, options)
    if in_place:  # constant folding would read the weights from their file
        off = ["ConstantFolding"]
        return ort.InferenceSession(model, options, providers=[provider], disabled_optimizers=off)
    if capture:
        capturing = (provider, {"enable_cuda_graph": "1"})
        with contextlib.suppress(Exception):  # a node is left to the CPU
            return ort.InferenceSession(model, options, providers=[capturing])
    return ort.InferenceSession(model, options, providers=[provider])


def _default_threads() -> int:
    """The cores available to this process, at most 8: decoding is memory-bound, and more threads
    only contend."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min(8, count))
