"""Questions, answers and how answers end, against a real endpoint on loopback."""

import socket
import threading

import pytest

from llmtrain.client.client import Sampling
from llmtrain.errors import EngineUnavailable, UserError
from llmtrain.ui.answers import Answers, Choice, Question, Turn, choices, sampling
from tests.unit.ui.endpoint import Endpoint, serving, wait_for


def question(endpoint: Endpoint, model: str, before: tuple[Turn, ...] = (), system: str = "") -> Question:
    return Question(Choice(endpoint.url, model), before, "Why?", system, Sampling(max_tokens=8))


def last(answers: Answers, *questions: Question) -> tuple[Turn, ...]:
    *_, turns = answers.ask("session", questions)
    return turns


def test_every_model_of_every_endpoint_can_be_chosen(endpoint: Endpoint):
    with serving(Endpoint(models=("good@1.1.0",))) as other:
        found = choices([endpoint.url, f"{other.url}/v1", f"{endpoint.url}/"])
    assert [(one.url, one.model) for one in found[:2]] == [(endpoint.url, "good@1.0.0"), (endpoint.url, "breaks")]
    assert [(one.url, one.model) for one in found[len(endpoint.models) :]] == [(other.url, "good@1.1.0")]
    assert found[0].name == f"good@1.0.0 at {endpoint.url.removeprefix('http://')}"


def test_an_endpoint_that_is_away_or_empty_is_said():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(EngineUnavailable, match="does not answer"):
            choices([f"http://127.0.0.1:{nobody.getsockname()[1]}"])
    with serving(Endpoint(models=())) as empty, pytest.raises(EngineUnavailable, match="serves no model yet"):
        choices([empty.url])


def test_an_answer_grows_piece_by_piece():
    with serving(Endpoint(pause_s=0.3)) as endpoint:
        seen = [turns[0] for turns in Answers().ask("session", [question(endpoint, "good@1.0.0")])]
    assert seen[0] == Turn("Why?", "", "writing")
    assert {turn.answer for turn in seen} & {"One", "One two"}, "a slow machine may miss one of them"
    assert all(turn.end == "writing" for turn in seen[:-1])
    assert seen[-1] == Turn("Why?", "One two three", "whole")
    assert seen[-1].note == ""


def test_two_are_asked_at_the_same_time():
    with serving(Endpoint(pause_s=0.3)) as endpoint:
        turns = last(Answers(), question(endpoint, "good@1.0.0"), question(endpoint, "good@1.1.0"))
    assert [turn.answer for turn in turns] == ["One two three"] * 2
    assert endpoint.most_at_once == 2


@pytest.mark.parametrize(
    ("model", "answer", "end", "note"),
    [
        ("breaks", "One two", "failed", "Not whole: {url}: the stream broke off"),
        ("fails", "One two", "failed", "Not whole: {url}: the stream failed: out of <b>memory</b>"),
        ("busy", "", "failed", "No answer: {url} takes no request now (429): too many requests"),
        ("short", "One two three", "length", "Not whole: max_tokens were written, or the context is full."),
    ],
)
def test_what_came_of_a_broken_answer_stays_and_is_marked(
    endpoint: Endpoint, model: str, answer: str, end: str, note: str
):
    broken, whole = last(Answers(), question(endpoint, model), question(endpoint, "good@1.0.0"))
    assert (broken.answer, broken.end) == (answer, end)
    assert broken.note.startswith(note.format(url=endpoint.url))
    assert (whole.answer, whole.end) == ("One two three", "whole")


def test_stop_ends_the_wait_and_the_engines_work(endpoint: Endpoint):
    answers = Answers()
    seen = answers.ask("session", [question(endpoint, "silent"), question(endpoint, "good@1.0.0")])
    while [turn.answer for turn in next(seen)] != ["One", "One two three"]:
        pass
    threading.Timer(0.2, answers.stop, ["session"]).start()  # in the middle of a wait that would take an hour
    *_, turns = seen
    assert [(turn.answer, turn.end) for turn in turns] == [("One", "stopped"), ("One two three", "whole")]
    assert turns[0].note == "Not whole: stopped."
    wait_for(lambda: endpoint.gone == ["silent"])


def test_stop_before_the_first_piece_is_said(endpoint: Endpoint):
    endpoint.pieces, endpoint.pause_s = ("late",), 3600
    answers = Answers()
    seen = answers.ask("session", [question(endpoint, "good@1.0.0")])
    next(seen)
    wait_for(lambda: endpoint.asked)
    answers.stop("session")
    *_, (turn,) = seen
    assert turn.note == "No answer: stopped."
    wait_for(lambda: endpoint.gone == ["good@1.0.0"])


def test_stop_of_one_session_leaves_the_others(endpoint: Endpoint):
    answers = Answers()
    stopped, going = (answers.ask(name, [question(endpoint, "silent")]) for name in ("one", "two"))
    for seen in (stopped, going):
        while not next(seen)[0].answer:
            pass
    answers.stop("one")
    wait_for(lambda: endpoint.gone == ["silent"])
    answers.stop_all()
    wait_for(lambda: endpoint.gone == ["silent", "silent"])
    assert next(going)[0].end == "stopped"


def test_a_reader_that_leaves_ends_the_engines_work(endpoint: Endpoint):
    seen = Answers().ask("session", [question(endpoint, "silent")])
    while not next(seen)[0].answer:
        pass
    seen.close()
    wait_for(lambda: endpoint.gone == ["silent"])


def test_our_own_mistake_is_raised_and_not_waited_for(endpoint: Endpoint):
    with pytest.raises(Exception, match="serialize"):
        last(Answers(), question(endpoint, "good@1.0.0", system=object()))


def test_the_conversation_goes_along_without_what_was_not_answered(endpoint: Endpoint):
    before = (Turn("One?", "Yes.", "whole"), Turn("Two?", "", "failed", "away"), Turn("Three?", "Ye", "stopped"))
    last(Answers(), question(endpoint, "good@1.0.0", before, system="Be brief."))
    last(Answers(), question(endpoint, "good@1.0.0"))
    first, second = (body["messages"] for body in endpoint.asked)
    assert [(message["role"], message["content"]) for message in first] == [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "Yes."),
        ("user", "Three?"),
        ("assistant", "Ye"),
        ("user", "Why?"),
    ]
    assert second == [{"role": "user", "content": "Why?"}]


def test_settings_are_numbers_or_left_to_the_engine():
    assert sampling(["64", " 0.5 ", "", "", "7"]) == Sampling(max_tokens=64, temperature=0.5, seed=7)
    with pytest.raises(
        UserError, match=r"^max_tokens: got '1.5', wants a whole number; top_p: got 'much', wants a number$"
    ):
        sampling(["1.5", "", "much", "", ""])


def test_what_is_out_of_range_is_named_and_not_sent(endpoint: Endpoint):
    asked = Question(Choice(endpoint.url, "good@1.0.0"), (), "Why?", "", Sampling(temperature=3.0))
    (turn,) = last(Answers(), asked)
    assert turn.note.startswith("No answer: not a valid request: temperature: ")
    assert endpoint.asked == []
