"""Errors of a request, as the JSON that OpenAI's clients expect."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from dlp_edge.errors import BusyError, ContextLengthError, DlpEdgeError, UsageError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class HttpError(Exception):
    """An error response.

    Args:
        status: the HTTP status.
        param: the invalid parameter of the request.
        code: a machine-readable reason.
        headers: extra headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def document(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.document, self.status, self.headers)


def to_http_error(error: Exception) -> HttpError:
    """The error response to an exception: never a traceback, and no detail of unexpected errors."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ContextLengthError):
        return HttpError(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, UsageError):
        return HttpError(400, str(error))
    if isinstance(error, BusyError):
        return HttpError(429, str(error), code="busy", headers={"Retry-After": "1"})
    if isinstance(error, DlpEdgeError):
        return HttpError(500, str(error))
    if isinstance(error, MemoryError):
        return HttpError(500, "Memory ran out. Ask for less, or give the server more.")
    return HttpError(500, "Internal error. The server's standard error says more.")
