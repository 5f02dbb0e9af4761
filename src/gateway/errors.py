"""Every failure the gateway reports, as one tree; each class owns its HTTP status, type and code.

::

    GatewayError                                 500 server_error          internal_error
    ├── InvalidRequest                           400 invalid_request_error
    │   ├── UnsupportedParameter                 400                       unsupported_parameter
    │   ├── UnsupportedValue                     400                       unsupported_value
    │   ├── ContentPolicyViolation               400                       content_policy_violation
    │   ├── InvalidToolArguments                 400                       invalid_tool_arguments
    │   ├── RequiredToolMissing                  400                       tool_missing
    │   ├── BodyTooLarge                         413                       request_too_large
    │   └── UpstreamRejected                     400/413/422               the upstream's own code
    ├── Unauthenticated                          401 invalid_request_error invalid_api_key
    ├── LentKeyMissing                           401 invalid_request_error upstream_key_missing
    ├── LentKeyRefused                           401 invalid_request_error upstream_key_refused
    ├── PermissionDenied                         403 invalid_request_error permission_denied
    │   ├── ModelNotAllowed                      403                       model_not_allowed
    │   ├── ScopeRequired                        403                       insufficient_scope
    │   └── ToolDenied                           403                       tool_denied
    ├── NotFound                                 404 invalid_request_error not_found
    │   ├── ModelNotFound                        404                       model_not_found
    │   └── ToolNotFound                         404                       tool_not_found
    ├── MethodNotAllowed                         405 invalid_request_error method_not_allowed
    ├── RequestTimedOut                          408 invalid_request_error request_timeout
    ├── Conflict                                 409 invalid_request_error conflict
    ├── ApprovalRequired                         409 invalid_request_error approval_required
    ├── TooManyFailures                          429 rate_limit_error      too_many_failures
    ├── UpstreamRateLimited                      429 rate_limit_error      rate_limit_exceeded
    ├── RateLimited                              429 requests, tokens, …   rate_limit_exceeded
    ├── BudgetExhausted                          429 insufficient_quota    insufficient_quota
    ├── AgentFailed                              502 server_error          agent_error
    │   ├── RunBudgetExceeded                    502                       run_budget_exceeded
    │   └── ModelBehaviorFailed                  502                       model_behavior_error
    ├── AgentMisconfigured                       500 server_error          agent_configuration_error
    ├── RunTimedOut                              504 server_error          run_timeout
    ├── UpstreamError                            502 server_error          upstream_error
    │   ├── UpstreamUnreachable                  502                       upstream_unreachable
    │   ├── UpstreamAuthFailed                   502                       upstream_auth_error
    │   ├── UpstreamModelNotFound                502                       upstream_model_not_found
    │   ├── UpstreamMalformed                    502                       upstream_malformed
    │   ├── UpstreamIncomplete                   502                       upstream_incomplete
    │   ├── UpstreamUnavailable                  503                       upstream_unavailable
    │   └── UpstreamTimeout                      504                       upstream_timeout
    ├── ToolError                                502 server_error          tool_error
    │   ├── ToolFailed                           502                       tool_error
    │   │   └── ToolResultTooLarge               502                       tool_result_too_large
    │   ├── ToolUnavailable                      503                       tool_unavailable
    │   └── ToolTimedOut                         504                       tool_timeout
    ├── ServiceUnavailable                       503 service_unavailable_error  service_unavailable
    │   ├── Overloaded                           503                       overloaded
    │   ├── WorkersDisagree                      503                       workers_disagree
    │   ├── ShuttingDown                         503                       shutting_down
    │   └── StoreUnavailable                     503                       store_unavailable
    └── ConfigError                              500 server_error          configuration_error

The message is read by the person who sent the request: it says what to do, and never holds a key, a stack,
a path of the server or an upstream's own headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

FaultDomain = Literal["caller", "policy", "upstream", "own"]


class GatewayError(Exception):
    """Something the gateway can explain.

    ``param`` names the request field at fault. ``should_retry`` becomes ``x-should-retry``: ``False`` after
    a side effect or where a retry cannot help; ``None`` leaves the choice to the client. ``retry_after_s``
    (seconds) becomes ``retry-after``. ``upstream_error`` is the error object of an upstream that blames the request or
    its rate, keys masked, and ``upstream_headers`` its ids and limits; both are shown instead of our own words where
    the call was relayed (``is_relayed``). ``words`` is the part of the message that an upstream wrote: it may
    quote a prompt, and is for the caller alone (see `told`). ``routed`` is the upstream that failed last, and how many
    requests went out. ``headers`` are further ones of the answer.
    """

    status: int = 500
    type: str = "server_error"
    code: str | None = "internal_error"
    domain: ClassVar[FaultDomain] = "own"
    default_should_retry: ClassVar[bool | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status
        self.retry_after_s = retry_after_s
        self.should_retry = self.default_should_retry if should_retry is None else should_retry
        self.routed: tuple[str, int] | None = None
        self.words = ""
        self.upstream_error: Mapping[str, Any] | None = None
        self.upstream_headers: tuple[tuple[bytes, bytes], ...] = ()
        self.is_relayed = False
        self.headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def told(self) -> str:
        """The message for others than the caller."""
        return self.message.replace(self.words, "(the upstream's own words)") if self.words else self.message


class InvalidRequest(GatewayError):
    """The request itself cannot be served as written."""

    status, type = 400, "invalid_request_error"
    code: str | None = None
    domain: ClassVar[FaultDomain] = "caller"


class UnsupportedParameter(InvalidRequest):
    """A known field that this model cannot honour."""

    code = "unsupported_parameter"


class UnsupportedValue(InvalidRequest):
    """A known field with a value that this model cannot honour."""

    code = "unsupported_value"


class ContentPolicyViolation(InvalidRequest):
    """An input guardrail of the agent refused the request."""

    code = "content_policy_violation"
    domain = "policy"


class InvalidToolArguments(InvalidRequest):
    """The arguments of a tool call do not fit the tool's JSON Schema."""

    code = "invalid_tool_arguments"


class RequiredToolMissing(InvalidRequest):
    """The agent cannot work without a tool that does not exist now."""

    code = "tool_missing"


class BodyTooLarge(InvalidRequest):
    """The body passed its limit while it was being read."""

    status, code = 413, "request_too_large"


class UpstreamRejected(InvalidRequest):
    """The upstream refused a field that came from the client; status and code are the upstream's."""


class Unauthenticated(GatewayError):
    """No key, or one that is unknown, expired or not honoured here."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"
    domain = "caller"


class LentKeyMissing(GatewayError):
    """The upstream works with its callers' own keys, and this caller lent none."""

    status, type, code = 401, "invalid_request_error", "upstream_key_missing"
    domain = "caller"
    default_should_retry = False


class LentKeyRefused(GatewayError):
    """The upstream refused the key that the caller lent for it (401 or 403)."""

    status, type, code = 401, "invalid_request_error", "upstream_key_refused"
    domain = "caller"
    default_should_retry = False


class PermissionDenied(GatewayError):
    """The key is good, but does not reach this."""

    status, type, code = 403, "invalid_request_error", "permission_denied"
    domain = "policy"


class ModelNotAllowed(PermissionDenied):
    """The key's access list does not reach this model."""

    code = "model_not_allowed"


class ScopeRequired(PermissionDenied):
    """The route needs a scope that the key does not have."""

    code = "insufficient_scope"


class ToolDenied(PermissionDenied):
    """A tool guardrail, the caller's right or a policy stands against a tool call."""

    code = "tool_denied"


class NotFound(GatewayError):
    """Nothing answers at this path."""

    status, type, code = 404, "invalid_request_error", "not_found"
    domain = "caller"


class ModelNotFound(NotFound):
    """No model of this name, or none the key may know of."""

    code = "model_not_found"


class ToolNotFound(NotFound):
    """No tool of this name, or none the key may know of."""

    code = "tool_not_found"


class MethodNotAllowed(GatewayError):
    """The path exists, the method does not."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"
    domain = "caller"

    def __init__(self, message: str, *, allow: tuple[str, ...] = ("GET", "POST")) -> None:
        super().__init__(message)
        self.allow = allow


class RequestTimedOut(GatewayError):
    """The client took too long to send its body."""

    status, type, code = 408, "invalid_request_error", "request_timeout"
    domain = "caller"


class Conflict(GatewayError):
    """What is to be made is there already."""

    status, type, code = 409, "invalid_request_error", "conflict"
    domain = "caller"
    default_should_retry = False


class ApprovalRequired(GatewayError):
    """The agent's author wants a person to approve a tool call, and this surface cannot suspend a run."""

    status, type, code = 409, "invalid_request_error", "approval_required"
    domain = "policy"
    default_should_retry = False


class TooManyFailures(GatewayError):
    """Too many wrong keys came from the caller's address; ``retry_after_s`` until it may try again."""

    status, type, code = 429, "rate_limit_error", "too_many_failures"
    domain = "policy"
    default_should_retry = False


class UpstreamRateLimited(GatewayError):
    """The upstream's own limit; ``retry_after_s`` is the upstream's."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"
    domain = "upstream"


class RateLimited(GatewayError):
    """A limit of the caller: ``type`` says of what (``requests``, ``tokens``; of runs ``rate_limit_error``)."""

    status, type, code = 429, "requests", "rate_limit_exceeded"
    domain = "policy"


class BudgetExhausted(GatewayError):
    """What the caller may spend is spent, or the call might cost more than is left."""

    status, type, code = 429, "insufficient_quota", "insufficient_quota"
    domain = "policy"
    default_should_retry = False


class AgentFailed(GatewayError):
    """The author's code raised while the agent ran; not retried, because its tools may have acted."""

    status, code = 502, "agent_error"
    default_should_retry = False


class RunBudgetExceeded(AgentFailed):
    """The run passed one of its caps, over all its agents; the message names it."""

    code = "run_budget_exceeded"
    domain = "policy"


class ModelBehaviorFailed(AgentFailed):
    """The model answered with something the agent cannot use (unknown tool, invalid final JSON)."""

    code = "model_behavior_error"
    domain = "upstream"


class AgentMisconfigured(GatewayError):
    """The agent is set up in a way that cannot run."""

    code = "agent_configuration_error"
    default_should_retry = False


class RunTimedOut(GatewayError):
    """The run passed its total deadline."""

    status, code = 504, "run_timeout"
    default_should_retry = False


class UpstreamError(GatewayError):
    """The upstream answered with a failure of its own."""

    status, code = 502, "upstream_error"
    domain = "upstream"


class UpstreamUnreachable(UpstreamError):
    """No connection: refused, reset before an answer, unknown host, TLS failure."""

    code = "upstream_unreachable"


class UpstreamAuthFailed(UpstreamError):
    """The upstream refused *our* key (its 401 or 403); the caller's key is not at fault."""

    code = "upstream_auth_error"
    default_should_retry = False


class UpstreamModelNotFound(UpstreamError):
    """The upstream does not have the model that the configuration names."""

    code = "upstream_model_not_found"
    default_should_retry = False


class UpstreamMalformed(UpstreamError):
    """The upstream's answer is not what its protocol allows (HTML, bad JSON, oversize event, compression)."""

    code = "upstream_malformed"


class UpstreamIncomplete(UpstreamError):
    """The upstream's answer ended before it was finished."""

    code = "upstream_incomplete"


class UpstreamUnavailable(UpstreamError):
    """The upstream says it is overloaded or down (its 503)."""

    status, code = 503, "upstream_unavailable"


class UpstreamTimeout(UpstreamError):
    """A deadline passed: connect, first byte, idle or total."""

    status, code = 504, "upstream_timeout"


class ToolError(GatewayError):
    """A call of a tool gave no result; not retried by the client, because the tool may have acted."""

    status, code = 502, "tool_error"
    domain = "upstream"
    default_should_retry: ClassVar[bool | None] = False


class ToolFailed(ToolError):
    """The tool began and failed: an exception, an answer that makes no sense."""


class ToolResultTooLarge(ToolFailed):
    """The tool's result passed its limit while it was read."""

    code = "tool_result_too_large"


class ToolUnavailable(ToolError):
    """The call never reached the tool: its server is down, its circuit open, the tool quarantined."""

    status, code = 503, "tool_unavailable"
    default_should_retry = None


class ToolTimedOut(ToolError):
    """The tool took longer than its timeout."""

    status, code = 504, "tool_timeout"


class ServiceUnavailable(GatewayError):
    """The gateway cannot serve this now."""

    status, type, code = 503, "service_unavailable_error", "service_unavailable"


class Overloaded(ServiceUnavailable):
    """The process has as many connections or runs as it takes at a time."""

    code = "overloaded"


class WorkersDisagree(ServiceUnavailable):
    """Not every worker process serves the same configuration after a refresh."""

    code = "workers_disagree"


class ShuttingDown(ServiceUnavailable):
    """The process is on its way out."""

    code = "shutting_down"


class StoreUnavailable(ServiceUnavailable):
    """The gateway's own database does not answer, is locked, full or read-only."""

    code = "store_unavailable"


class ConfigError(GatewayError):
    """A configuration file or setting is wrong; the message names the file, the key and what is accepted."""

    code = "configuration_error"
    default_should_retry = False
