"""What goes wrong with a request, as the error JSON that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from dlp_edge.errors import BusyError, ContextLengthError, DlpEdgeError, UsageError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(Exception):  # noqa: N818 - an answer to the client, not a failure of ours
    """A request that is answered with an error.

    Args:
        param: the request's parameter that is wrong.
        code: what is wrong, for programs.
        headers: to be sent with it.
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


def problem_of(error: Exception) -> Problem:
    """What the client is told about an exception: never a traceback, and nothing at all about
    one that was not raised on purpose."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ContextLengthError):
        return Problem(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, UsageError):
        return Problem(400, str(error))
    if isinstance(error, BusyError):
        return Problem(429, str(error), code="busy", headers={"Retry-After": "1"})
    if isinstance(error, DlpEdgeError):
        return Problem(500, str(error))
    if isinstance(error, MemoryError):
        return Problem(500, "Memory ran out. Ask for less, or give the server more.")
    return Problem(500, "Internal error. The server's standard error says more.")
