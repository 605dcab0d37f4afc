"""What the gateway answers instead of a reply, in the shape that OpenAI's clients understand. Decides nothing."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An answer that is an error: an HTTP status and OpenAI's four fields.

    `param` names what is at fault, as a path into the request; the message ends with the remedy.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_value(param: str, value: object, allowed: str) -> ApiError:
    """A parameter whose value is of the wrong kind."""
    return ApiError(400, f"{param} = {_short(value)}: it must be {allowed}", param=param, code="invalid_value")


def not_honoured(param: str, value: object, remedy: str) -> ApiError:
    """A parameter that is right, and that this endpoint cannot do what it asks for."""
    return ApiError(
        400, f"{param} = {_short(value)} cannot be honoured here: {remedy}", param=param, code="unsupported_parameter"
    )


def ended() -> ApiError:
    """For calls that come after the episode's end."""
    return ApiError(401, "the episode of this API key has ended", code="episode_ended", kind="authentication_error")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
