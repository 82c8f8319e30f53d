"""The page of `llmtrain chat`, in Gradio: what stands where, and what happens when a button is pressed."""

import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when the page is made and when it is served

import gradio as gr

from llmtrain.client.client import Sampling
from llmtrain.errors import LLMTrainError, UserError
from llmtrain.ui.answers import SETTINGS, Answers, Choice, Question, Turn, choices, sampling

SIDES = ("left", "right")
START = Sampling(max_tokens=256, temperature=0.7)
"""What the page begins with."""
THEME = gr.themes.Default(primary_hue="blue", secondary_hue="blue").set(
    button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700"
)
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
footer {display: none !important}
.conversation .html-container {height: 40vh; overflow-y: auto; padding: 0}
.conversation .html-container {display: flex; flex-direction: column-reverse}
.conversation .prose {margin-bottom: auto}
.question, .answer {white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 0.7em; color: var(--body-text-color)}
.question {margin-left: 15%; padding: 0.4em 0.8em; border-radius: 0.6em; background: var(--color-accent-soft)}
.writing::after {content: " ▍"}
.problem {margin: 0 0 0.7em; overflow-wrap: anywhere; color: var(--error-text-color)}
.problem {padding-left: 0.6em; border-left: 3px solid var(--error-border-color)}
"""
"""A reversed column stays at its end while it grows, and where its reader scrolled to; Gradio's autoscroll loses it."""


def build(listed: Sequence[Choice], answers: Answers) -> gr.Blocks:
    """The page on the models that are `listed`; each time it is opened, the endpoints are asked for theirs again."""
    known = {choice.name: choice for choice in listed}
    several = len(known) > 1
    with gr.Blocks(title="llmtrain chat", analytics_enabled=False) as page:
        both = gr.Checkbox(several, label="Side by side: the same question to two models")
        models, conversations, columns = [], [], []
        with gr.Row():
            for place, side in enumerate(SIDES):
                with gr.Column(min_width=300, visible=place == 0 or several) as column:
                    models.append(
                        gr.Dropdown(list(known), value=list(known)[place % len(known)], label=f"Model, {side}")
                    )
                    conversations.append(gr.HTML(shown(()), container=True, padding=True, elem_classes="conversation"))
                columns.append(column)
        turns = [gr.State(()) for _ in SIDES]
        alert = gr.HTML(visible=False)
        with gr.Row(equal_height=True):
            hint = "Enter sends, Shift+Enter starts a line"
            box = gr.Textbox(label="Question", placeholder=hint, max_lines=8, autofocus=True, scale=6, min_width=300)
            send = gr.Button("Send", variant="primary", min_width=80)
            stop = gr.Button("Stop", min_width=80, interactive=False)
            reset = gr.Button("Reset", min_width=80)
        system = gr.Textbox(label="System message", placeholder="the chat template's own, if it has one", max_lines=8)
        with gr.Row():
            starts = ["" if (value := getattr(START, name)) is None else str(value) for name in SETTINGS]
            settings = [
                gr.Textbox(start, label=name, placeholder="the engine's", max_lines=1, min_width=110)
                for name, start in zip(SETTINGS, starts, strict=True)
            ]

        def ready(ready: bool) -> dict[Any, Any]:
            now, later = gr.update(interactive=ready), gr.update(interactive=not ready)
            return {send: now, reset: now, stop: later}

        def ask(
            request: gr.Request, text: str, both: bool, left: str, right: str,
            left_turns: tuple[Turn, ...], right_turns: tuple[Turn, ...], system: str, *values: str,
        ) -> Iterator[dict[Any, Any]]:  # fmt: skip
            if not text.strip():
                yield {box: ""}
                return
            try:
                chosen = sampling(values)
            except UserError as error:
                yield {alert: alerting([str(error)])}
                return
            yield ready(False) | {box: "", alert: alerting([])}
            names, before = [left, right][: 1 + both], [left_turns, right_turns][: 1 + both]
            questions = [
                Question(known[name], earlier, text, system, chosen)
                for name, earlier in zip(names, before, strict=True)
            ]  # fmt: skip
            for written in answers.ask(str(request.session_hash), questions):
                now = [(*earlier, turn) for earlier, turn in zip(before, written, strict=True)]
                yield dict(zip(turns, now, strict=False)) | dict(zip(conversations, map(shown, now), strict=False))
            yield ready(True)

        def interrupt(request: gr.Request) -> None:
            answers.stop(str(request.session_hash))

        def refresh() -> dict[Any, Any]:
            problems = []
            for url, key in dict.fromkeys((choice.url, choice.api_key_env) for choice in known.values()):
                try:
                    known.update({choice.name: choice for choice in choices([url], key)})
                except LLMTrainError as error:
                    problems.append(str(error))
            return {alert: alerting(problems)} | dict.fromkeys(models, gr.update(choices=list(known)))

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        at_once = quiet | {"queue": False}
        inputs = [box, both, *models, *turns, system, *settings]
        outputs = [box, alert, send, stop, reset, *turns, *conversations]
        gr.on([send.click, box.submit], ask, inputs, outputs, concurrency_limit=None, trigger_mode="once", **quiet)
        stop.click(interrupt, **at_once)
        reset.click(lambda: [(), (), shown(()), shown(())], None, [*turns, *conversations], **at_once)
        both.change(lambda both: gr.update(visible=both), both, columns[1], **at_once)
        page.load(refresh, None, [alert, *models], **quiet)
        page.unload(interrupt)
    return page


def shown(turns: Sequence[Turn]) -> str:
    """A conversation as HTML. All texts are escaped: what a model writes runs nothing and fetches nothing."""
    lines = []
    for turn in turns:
        lines.append(f'<div class="question">{escape(turn.question)}</div>')
        if turn.answer or turn.end == "writing":
            writing = " writing" if turn.end == "writing" else ""
            lines.append(f'<div class="answer{writing}">{escape(turn.answer)}</div>')
        if turn.note:
            lines.append(_problem(turn.note, new=turn is turns[-1]))
    return f'<div role="log" aria-live="off" aria-label="Conversation">{"".join(lines)}</div>'


def alerting(problems: Sequence[str]) -> dict[str, Any]:
    """The place above the question, with what is wrong; hidden where nothing is."""
    lines = "".join(_problem(problem, new=True) for problem in problems)
    updated: dict[str, Any] = gr.update(value=lines, visible=bool(problems))
    return updated


def _problem(text: str, *, new: bool) -> str:
    """A new one is read out by screen readers; an old one would be again with every piece of the next answer."""
    role = ' role="alert"' if new else ""
    return f'<div class="problem"{role}>{escape(text)}</div>'
