"""What is wrong with a request is told in OpenAI's form; tests/e2e/test_litserve.py has the table of bad input."""

import json
from http import HTTPStatus

import pytest

from llmtrain.client.protocol import CompletionRequest
from llmtrain.serving.http_errors import Refused, as_json, no_such_path, parsed


def refusal(**body: object) -> Refused:
    with pytest.raises(Refused) as error:
        parsed(CompletionRequest, json.dumps({"model": "m", "prompt": "a"} | body).encode())
    return error.value


def test_all_problems_are_told_at_once_and_the_first_is_named() -> None:
    found = refusal(n=10**6, stop=5, max_token=1)
    assert found.message == (
        "n: input should be less than or equal to 16 (given: 1000000); stop is none of what it may be: Texts that end "
        "the answer; they are not part of it.; max_token: no such field; did you mean 'max_tokens'?"
    )
    assert (found.status, found.param, found.code) == (400, "n", "invalid_value")
    assert found.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([5, -1], "prompt[1]: input should be greater than or equal to 0 (given: -1)"),
        ([[5], [6, -1]], "prompt[1][1]: input should be greater than or equal to 0 (given: -1)"),
        ([[5], []], "prompt[1]: tuple should have at least 1 item after validation, not 0"),
        (["a", ""], 'prompt[1]: string should have at least 1 character (given: "")'),
        ("", 'prompt: string should have at least 1 character (given: "")'),
        ([], "prompt: tuple should have at least 1 item after validation, not 0"),
        (
            {"a": 1},
            "prompt is none of what it may be: A text, token ids, or several of either, each of which gives `n` "
            "choices.",
        ),
    ],
)
def test_of_several_kinds_of_value_the_nearest_is_explained(prompt: object, says: str) -> None:
    assert refusal(prompt=prompt).message == says


def test_long_values_are_not_repeated() -> None:
    assert "given" not in refusal(temperature="x" * 1000).message


def test_a_long_list_of_wrong_items_is_one_problem() -> None:
    assert refusal(prompt=[-1] * 100_000).message.startswith("prompt[0]: ")


def test_paths_that_are_not_there_name_the_nearest() -> None:
    found = no_such_path("/v1/completion", ["/v1/completions", "/health"])
    assert found.message == "there is no /v1/completion here; did you mean '/v1/completions'?"


@pytest.mark.parametrize(
    ("status", "kind"), [(429, "rate_limit_error"), (503, "service_unavailable_error"), (500, "server_error")]
)
def test_types_tell_whose_fault_it_is(status: int, kind: str) -> None:
    response = Refused(HTTPStatus(status), "busy", retry_after_s=2).response
    assert json.loads(response.body)["error"] == {"message": "busy", "type": kind, "param": None, "code": None}
    assert (response.status_code, response.headers["retry-after"]) == (status, "2")


def test_numbers_that_json_has_not_are_never_sent() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json({"logprob": float("-inf")})
    assert as_json({"text": "Größe"}) == '{"text":"Größe"}'
