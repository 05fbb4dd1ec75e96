"""Every error that asmodel raises on purpose, and what a client is told about it.

AsmodelError
├── InvalidRequest             400  the request cannot be read; names the parameter
│   ├── ModelNotFound          404  nothing is served under that name
│   ├── Unsupported            400  asks for what this program or upstream does not do
│   └── PayloadTooLarge        413
├── Forbidden                  403  a local server was asked through a name that is not local
├── ProgramError               500  the program broke a rule or raised; not worth a retry
│   ├── StepError              502  a step's reply could not be read, even when asked again
│   ├── EffectUnknown          409  an effect was begun and may have been done (effects.py)
│   └── JournalUnusable        503  an effect cannot be written down, so it is not begun (effects.py)
├── LimitExceeded              422  calls, tokens or cost used up; not worth a retry
│   └── DeadlineExceeded       504  the time is used up
├── NotCached                  504  only cached answers were wanted, and there is none (RFC 9111, 5.2.1.7)
├── UpstreamError              502  an upstream failed, in one of the ways below
│   ├── UpstreamAuth           502  it refuses *our* key; code `upstream_auth`, not worth a retry
│   ├── UpstreamRejected       400  it calls the request wrong
│   ├── UpstreamRateLimited    429  with `retry_after`
│   ├── UpstreamUnreachable    502  no connection
│   ├── UpstreamUnavailable    503  it answers 5xx, or is still loading
│   ├── UpstreamTimeout        504  connect, first byte or total
│   └── UpstreamBroken         502  it answered with something that is not an answer
├── Draining                   503  the server is stopping
└── ConfigurationError         ---  the server does not start; says what to write instead

A message names the thing, what was wrong, and what would be right. It never holds a key, and never a prompt.
`try: ... except AsmodelError` is what a caller of the library writes; the routes do the same, once.
"""

from __future__ import annotations

from typing import ClassVar


class AsmodelError(Exception):
    """Base of the tree. `status`, `type` and `code` are the OpenAI error envelope's."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None
    retry: bool | None = None
    """What `x-should-retry` says; None leaves it to the status (408, 409, 429 and 5xx are retried by SDKs)."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.retry_after = retry_after
        """Seconds after which a retry is worth it, where the upstream said so."""

    def __str__(self) -> str:
        return self.message


class InvalidRequest(AsmodelError):
    status = 400
    type = "invalid_request_error"
    code: str | None = "invalid_request"
    retry = False


class ModelNotFound(InvalidRequest):
    status = 404
    code: str | None = "model_not_found"


class Unsupported(InvalidRequest):
    code: str | None = "unsupported_parameter"


class PayloadTooLarge(InvalidRequest):
    status = 413
    code: str | None = "payload_too_large"


class Forbidden(AsmodelError):
    status = 403
    type = "permission_error"
    code: str | None = "forbidden"
    retry = False


class ProgramError(AsmodelError):
    code: str | None = "program_error"
    retry = False


class StepError(ProgramError):
    """A step's reply stayed unreadable: names the program, the step, and shows what came back."""

    status = 502
    code: str | None = "step_unreadable"


class LimitExceeded(AsmodelError):
    status = 422
    type = "invalid_request_error"
    code: str | None = "limit_exceeded"
    retry = False


class DeadlineExceeded(LimitExceeded):
    status = 504
    type = "server_error"
    code: str | None = "deadline_exceeded"


class NotCached(AsmodelError):
    status = 504
    code: str | None = "not_cached"
    retry = False


class UpstreamError(AsmodelError):
    status = 502
    type = "upstream_error"
    code: str | None = "upstream_error"
    repeatable: ClassVar[bool] = False
    """Whether asking the same upstream again can help and is safe (nothing had been received)."""


class UpstreamAuth(UpstreamError):
    """Never 401: the client's key is fine, ours is not."""

    code: str | None = "upstream_auth"
    retry = False


class UpstreamRejected(UpstreamError):
    status = 400
    type = "invalid_request_error"
    code: str | None = "upstream_rejected"
    retry = False


class UpstreamRateLimited(UpstreamError):
    status = 429
    type = "rate_limit_error"
    code: str | None = "upstream_rate_limited"
    repeatable = True


class UpstreamUnreachable(UpstreamError):
    code: str | None = "upstream_unreachable"
    repeatable = True


class UpstreamUnavailable(UpstreamError):
    status = 503
    code: str | None = "upstream_unavailable"
    repeatable = True


class UpstreamTimeout(UpstreamError):
    status = 504
    code: str | None = "upstream_timeout"
    repeatable = True


class UpstreamBroken(UpstreamError):
    code: str | None = "upstream_broken"


class Draining(AsmodelError):
    status = 503
    code: str | None = "draining"
    retry = True


class ConfigurationError(AsmodelError):
    """Raised before anything is served; the command prints it and exits with 2."""

    code: str | None = "configuration_error"
