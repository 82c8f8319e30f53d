"""`llmtrain chat` as a user sees it: its process, its page in a real headless Chromium, a real endpoint on loopback."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from transformers import Qwen3Config, Qwen3ForCausalLM

from llmtrain.client.client import Client
from llmtrain.data.tokenizer import load_tokenizer, train_bpe
from tests.e2e.browser import FLAGS
from tests.unit.ui.endpoint import Endpoint, serving, wait_for

MODELS = ("good@1.0.0", "good@1.1.0", "breaks", "busy", "silent")
PIECES = (
    "    if x < y:\n        ",
    "<script>document.title = 'taken'</script>",
    "<img src='http://192.0.2.1/x.png'> ${1 + 1} {{this}} `",
)
"""Of every answer: Python's indentation; what would run; what would be fetched or worked out by a template."""
ANSWER = "".join(PIECES)
expect.set_options(timeout=60_000)  # of a machine that has much else to do
HARMLESS = "Autofocus processing was blocked because a document already has a focused element."
"""Chromium says it of Gradio's page."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with serving(Endpoint(models=MODELS, pieces=PIECES, pause_s=0.2)) as endpoint:
        yield endpoint


@contextmanager
def page_on(*urls: str) -> Iterator[str]:
    """`llmtrain chat` on endpoints; the page's address. SIGTERM must end it well."""
    command = [sys.executable, "-m", "llmtrain", "chat", *urls, "--port", "0", "--no-browser"]
    environment = os.environ | {"http_proxy": "http://192.0.2.1:3128"}  # nobody's; loopback must not go there
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            said = process.stdout.readline()
            found = re.match(r"llmtrain chat on (http://127\.0\.0\.1:\d+/) with ", said)
            assert found, said
            yield found[1]
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(endpoint: Endpoint) -> Iterator[str]:
    """A page on an endpoint that stays, and on one that goes away when the page is there."""
    with ExitStack() as stack:
        with serving(Endpoint(models=("away",))) as gone:
            address = stack.enter_context(page_on(endpoint.url, gone.url))
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(address: str, browser: Browser) -> Iterator[Page]:
    """The page, opened; what it asked for and complained of is judged at the end of each test."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    requested, complaints = [], []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    expect(page.get_by_role("alert")).to_have_text(re.compile("^http://127.* does not answer"))
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    yield page
    if not page.is_closed():
        assert page.title() == "llmtrain chat"
        page.close()
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
    assert [line for line in complaints if line != HARMLESS] == []


def choose(page: Page, side: str, model: str) -> None:
    box = page.get_by_label(f"Model, {side}")
    box.fill(f"{model} at")
    box.press("Enter")
    expect(box).to_have_value(re.compile(f"^{re.escape(model)} at 127"))


def ask(page: Page, question: str) -> None:
    """Ask, and wait until it is seen that it was; `Send` is disabled by then."""
    asked, sides = page.locator(".question:visible"), page.get_by_role("log").count()
    before = asked.count()
    page.get_by_role("textbox", name="Question").fill(question)
    page.keyboard.press("Enter")
    expect(asked).to_have_count(before + sides)


def answers(page: Page) -> Locator:
    return page.locator(".answer:visible")


def is_ready(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_two_models_answer_the_same_question_at_the_same_time_and_what_they_write_stays_text(
    page: Page, endpoint: Endpoint
):
    endpoint.most_at_once = 0
    ask(page, "What <b>is</b> it?")
    is_ready(page)
    assert answers(page).all_text_contents() == [ANSWER, ANSWER]
    assert page.locator(".question").all_text_contents() == ["What <b>is</b> it?"] * 2
    assert page.locator(".problem:visible").count() == page.locator(".answer.writing").count() == 0
    assert {body["model"] for body in endpoint.asked[-2:]} == {"good@1.0.0", "good@1.1.0"}
    assert endpoint.most_at_once == 2


def test_the_end_of_a_long_conversation_is_seen_and_shift_enter_starts_a_line(page: Page, endpoint: Endpoint):
    box = page.get_by_role("textbox", name="Question")
    ask(page, "line\n" * 30)
    is_ready(page)
    expect(answers(page).first).to_be_in_viewport(ratio=1)
    box.press_sequentially("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    box.press("Enter")
    expect(page.locator(".question").nth(1)).to_have_text("one\ntwo")
    is_ready(page)
    expect(answers(page).nth(1)).to_be_in_viewport(ratio=1)


def test_settings_and_system_message_reach_the_endpoint_and_the_conversation_goes_along(page: Page, endpoint: Endpoint):
    page.get_by_label("Side by side").uncheck()
    expect(page.get_by_label("Model, right")).to_be_hidden()
    for name, value in {"max_tokens": "33", "temperature": "0.25", "top_p": "0.5", "top_k": "9", "seed": "4"}.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("System message").fill("Be brief.")
    for question in ("One?", "Two?"):
        ask(page, question)
        is_ready(page)
    messages = [("system", "Be brief."), ("user", "One?"), ("assistant", ANSWER), ("user", "Two?")]
    assert endpoint.asked[-1] == {
        "model": "good@1.0.0",
        "messages": [{"role": role, "content": content} for role, content in messages],
        "max_tokens": 33,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 9,
        "seed": 4,
        "stream": True,
    }
    page.get_by_label("seed", exact=True).fill("four")
    page.get_by_role("textbox", name="Question").fill("Three?")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_have_text("seed: got 'four', wants a whole number")
    assert page.get_by_role("textbox", name="Question").input_value() == "Three?"


def test_stop_closes_the_stream_and_what_came_stays(page: Page, endpoint: Endpoint):
    endpoint.gone.clear()
    choose(page, "left", "silent")
    ask(page, "Will it end?")
    expect(answers(page).nth(1)).to_have_text(ANSWER)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("alert")).to_have_text(["Not whole: stopped."])
    is_ready(page)
    assert answers(page).all_text_contents() == [PIECES[0], ANSWER]
    wait_for(lambda: endpoint.gone == ["silent"])


def test_faults_are_said_where_the_answer_would_stand_and_the_page_goes_on(page: Page, endpoint: Endpoint):
    choose(page, "left", "breaks")
    choose(page, "right", "busy")
    ask(page, "First?")
    expect(page.locator(".problem:visible")).to_have_count(2)
    is_ready(page)
    choose(page, "right", "away")
    ask(page, "Second?")
    expect(page.locator(".problem:visible")).to_have_count(4)
    is_ready(page)
    broken = f"Not whole: {endpoint.url}: the stream broke off"
    assert [text.partition(" (")[0] for text in page.locator(".problem:visible").all_text_contents()] == [
        broken,
        broken,
        f"No answer: {endpoint.url} takes no request now",
        f"No answer: {page.get_by_label('Model, right').input_value().replace('away at ', 'http://')} does not answer",
    ]
    assert answers(page).all_text_contents() == ["".join(PIECES[:2])] * 2
    choose(page, "right", "good@1.1.0")
    ask(page, "Third?")
    expect(answers(page).last).to_have_text(ANSWER)
    is_ready(page)
    (last,) = (body["messages"] for body in endpoint.asked[-2:] if body["model"] == "good@1.1.0")
    assert last == [{"role": "user", "content": "Third?"}], "what got no answer is not sent again"


def test_reset_empties_both_conversations(page: Page, endpoint: Endpoint):
    ask(page, "First?")
    is_ready(page)
    page.get_by_role("button", name="Reset").click()
    expect(page.locator(".question")).to_have_count(0)
    ask(page, "Second?")
    is_ready(page)
    assert [message["content"] for message in endpoint.asked[-1]["messages"]] == ["Second?"]


def test_a_model_that_came_later_is_listed_when_the_page_is_opened_again(page: Page, endpoint: Endpoint):
    endpoint.models = (*MODELS, "later")
    page.reload()
    box = page.get_by_label("Model, left")
    box.click()
    expect(page.get_by_role("option", name=re.compile("^later at "))).to_be_visible()
    choose(page, "left", "later")
    ask(page, "Are you there?")
    is_ready(page)
    assert answers(page).all_text_contents() == [ANSWER, ANSWER]
    assert "later" in [body["model"] for body in endpoint.asked[-2:]]


def test_a_closed_tab_stops_the_engines_work(page: Page, endpoint: Endpoint):
    endpoint.gone.clear()
    choose(page, "left", "silent")
    choose(page, "right", "silent")
    ask(page, "Is anybody there?")
    expect(page.locator(".answer.writing")).to_have_text([PIECES[0]] * 2)
    page.close()
    wait_for(lambda: endpoint.gone == ["silent", "silent"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_shows_all_without_scrolling_sideways(address: str, browser: Browser, scheme: str):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.goto(address)
    ask(page, "A_long_word_" * 30)
    is_ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert [
        box
        for box in page.locator(".conversation .html-container").all()
        if box.evaluate("box => box.scrollWidth > box.clientWidth")
    ] == []
    page.close()


@pytest.fixture(scope="module")
def litserve(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of our LitServe engine with a tiny model, whose answers end at max_tokens only."""
    directory = tmp_path_factory.mktemp("served")
    train_bpe(["The quick brown fox jumps over the lazy dog."], 300, directory / "tiny")
    vocab_size = len(load_tokenizer(directory / "tiny"))
    config = Qwen3Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=20_000, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(directory / "tiny")
    overrides = f"run={directory}/tiny serving=litserve serving.port=0 infra.threads=1 tracking=none".split()
    command = [sys.executable, repository / "serve.py", *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=directory) as process:
        try:
            said = "".join(islice(process.stdout, 2))
            found = re.search(r" is ready: (http://127\.0\.0\.1:\d+)/v1", said)
            assert found, said
            yield found[1]
            process.terminate()
            process.wait(60)
        finally:
            process.kill()


@pytest.mark.campaign
def test_our_litserve_engine_answers_and_stops(litserve: str, browser: Browser):
    with page_on(litserve) as address, Client(litserve) as client:
        page = browser.new_page()
        page.goto(address)
        expect(page.get_by_label("Side by side")).not_to_be_checked()
        page.get_by_label("max_tokens", exact=True).fill("5")
        ask(page, "Hello?")
        is_ready(page)
        expect(page.get_by_role("alert")).to_have_text(["Not whole: max_tokens were written, or the context is full."])
        assert "llmtrain_generation_tokens_total 5.0" in client.metrics().splitlines()
        page.get_by_label("max_tokens", exact=True).fill("19000")
        ask(page, "Hello?")
        expect(answers(page).nth(1)).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("alert")).to_have_text("Not whole: stopped.")
        wait_for(lambda: "llmtrain_cancelled_total 1.0" in client.metrics().splitlines())
        page.close()
