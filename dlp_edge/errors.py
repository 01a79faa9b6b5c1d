"""The exceptions of dlp-edge: one hierarchy, each with a cause and a remedy."""

from __future__ import annotations


class DlpEdgeError(Exception):
    """Base of all errors of this package.

    Attributes:
        cause: what is wrong, naming the file, adapter or value.
        remedy: what the user can do about it.
        exit_code: exit status of the command line (2 usage, 3 bad bundle or adapter,
            4 resources, 1 anything else).
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}. {remedy}.")
        self.cause = cause
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[DlpEdgeError], tuple[str, str]]:
        return type(self), (self.cause, self.remedy)  # errors cross process boundaries


class UsageError(DlpEdgeError, ValueError):
    """An argument is invalid: an empty prompt, an unknown adapter name, a bad temperature."""

    exit_code = 2


class ContextLengthError(UsageError):
    """The prompt and the requested new tokens do not fit in the context."""


class BundleError(DlpEdgeError):
    """A bundle is missing, incomplete, damaged or of an unsupported version."""

    exit_code = 3


class AdapterError(DlpEdgeError):
    """A PEFT adapter cannot be read, or does not fit the backbone."""

    exit_code = 3


class BackboneError(DlpEdgeError):
    """A backbone cannot be read, or its architecture is not supported."""

    exit_code = 3


class RouterError(DlpEdgeError):
    """A router or its training data cannot be used."""

    exit_code = 3


class NonFiniteError(DlpEdgeError):
    """The backbone's logits are not finite, so no token can be chosen."""


class ResourceError(DlpEdgeError):
    """Memory or disk space ran out."""

    exit_code = 4


class DeviceError(ResourceError):
    """The requested device or execution provider is not available."""


class DeviceMemoryError(DeviceError):
    """The device's memory ran out; the CPU may have enough."""


class BusyError(ResourceError):
    """The runtime is busy with another request, and the call does not wait."""
