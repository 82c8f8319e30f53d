"""What is wrong with a request, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from llmtrain.config.suggest import closest, did_you_mean

Parsed = TypeVar("Parsed", bound=BaseModel)

TYPES = {
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "service_unavailable_error",
}
"""OpenAI's types of errors that are nobody's fault."""
LONGEST_SHOWN = 40
"""Characters of a wrong value that its message repeats."""


class Refused(Exception):
    """An answer that is an error. `param` names the field, `code` the reason for programs."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        by_class = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        kind = TYPES.get(self.status, by_class)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(content: object, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    """An answer of `as_json`, which leaves other alphabets readable."""
    return Response(as_json(content), status, headers, media_type="application/json")


def as_json(content: object) -> str:
    """Compact JSON. Raises ValueError for numbers that JSON has not."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def parsed(kind: type[Parsed], body: bytes) -> Parsed:
    """The request. Raises Refused with 400, all problems in one message: malformed JSON, unknown fields with the names
    that may have been meant, missing ones, values of another type or out of range."""
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    by_field: dict[str | None, list[ErrorDetails]] = {}
    for one in found:
        by_field.setdefault(str(one["loc"][0]) if one["loc"] else None, []).append(one)
    problems = [_problem(kind, field, errors) for field, errors in by_field.items()]
    message = "; ".join(text for text, _ in problems)
    param, (_, code) = next(iter(by_field)), problems[0]
    raise Refused(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def no_such_path(path: str, known: Sequence[str]) -> Refused:
    message = f"there is no {path} here{did_you_mean(closest(path, known))}"
    return Refused(HTTPStatus.NOT_FOUND, message, code="not_found")


def _problem(kind: type[BaseModel], field: str | None, errors: list[ErrorDetails]) -> tuple[str, str]:
    """What is wrong with one field, and OpenAI's code for it."""
    error = _most_telling(errors)
    if field is None:
        text = error["msg"].removeprefix("Value error, ").removeprefix("Invalid JSON: ")
        if error["type"] == "json_invalid":
            return f"the body is no JSON: {text}", "invalid_json"
        return ("the body is no JSON object" if error["type"] == "model_type" else text), "invalid_value"
    match error["type"]:
        case "extra_forbidden":
            name, owner = str(error["loc"][-1]), _owner(kind, error["loc"])
            return f"{_dotted(error)}: no such field{did_you_mean(closest(name, owner.model_fields))}", (
                "unknown_parameter"
            )
        case "missing":
            return f"{_dotted(error)} is missing", "missing_required_parameter"
        case wrong if _is_type(wrong):
            description = kind.model_fields[field].description
            if len({_branch(one) for one in errors}) > 1 and description:  # none of several kinds of value
                return f"{field} is none of what it may be: {description}", "invalid_type"
            return f"{_dotted(error)}: {_said(error)}", "invalid_type"
    return f"{_dotted(error)}: {_said(error)}", "invalid_value"


def _most_telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """Of the reasons why a value is none of several kinds: that of the kind which it nearly is."""
    outer = {one["loc"][:-1] for one in errors}  # where an item is wrong, its list is said to be too short
    inner = [one for one in errors if not (one["type"] == "too_short" and one["loc"] in outer)]
    return min(inner, key=lambda one: _is_type(one["type"]))


def _is_type(name: str) -> bool:
    return name.endswith("_type")


def _branch(error: ErrorDetails) -> Any:
    return error["loc"][1] if len(error["loc"]) > 1 else None


def _owner(kind: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The class whose field `loc` names last."""
    for name in loc[:-1]:
        annotation = kind.model_fields[str(name)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(one for one in options if isinstance(one, type) and issubclass(one, BaseModel))
    return kind


def _dotted(error: ErrorDetails) -> str:
    """`stream_options.include_usage`, `prompt[3]`; without the names that pydantic gives to kinds of values."""
    first, *rest = error["loc"]
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest if not _names_a_kind(part)]
    return str(first) + "".join(parts)


def _names_a_kind(part: int | str) -> bool:
    return isinstance(part, str) and (part in ("str", "int", "dict") or part.startswith(("constrained-", "tuple[")))


def _said(error: ErrorDetails) -> str:
    """pydantic's words, and the value where it is short."""
    words = error["msg"].removeprefix("Value error, ")
    words = words[0].lower() + words[1:]
    given = error["input"]
    shown = json.dumps(given) if isinstance(given, str | int | float | None) else ""
    return f"{words} (given: {shown})" if 0 < len(shown) <= LONGEST_SHOWN else words
