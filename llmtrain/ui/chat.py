"""`llmtrain chat`'s process: the page is served on loopback until somebody ends it."""

import os
import signal
import socket
import threading
from collections.abc import Sequence
from types import FrameType

from llmtrain.errors import UserError
from llmtrain.ui.answers import Answers, choices


def serve(urls: Sequence[str], api_key_env: str | None, host: str, port: int, *, browser: bool) -> None:
    """Serve the page and say where; returns after SIGTERM. Answers that are being written then are ended.

    `port` 0 means a free one. Raises what `choices` raises, and UserError where Gradio is not installed or the port is
    taken.
    """
    direct = (os.environ.get("no_proxy"), os.environ.get("NO_PROXY"), "127.0.0.1", "localhost", host)
    os.environ["no_proxy"] = ",".join(filter(None, direct))  # Gradio asks its own address whether it is there
    listed, port = choices(urls, api_key_env), _free(host, port)
    try:
        from llmtrain.ui.page import CSS, THEME, build
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs Gradio, which is not installed; run `pip install 'llmtrain[chat]'`") from error
    answers, ended = Answers(), threading.Event()
    page = build(listed, answers)

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = signal.signal(signal.SIGTERM, end)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            css=CSS,
            theme=THEME,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            run_history=False,
            pwa=False,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        print(
            f"llmtrain chat on {page.local_url} with {', '.join(choice.name for choice in listed)}; Ctrl-C ends it",
            flush=True,
        )
        ended.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        answers.stop_all()
        page.close(verbose=False)


def _free(host: str, port: int) -> int:
    """`port`, or a free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was used a moment ago is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); --port 0 takes a free one") from error
        return int(probe.getsockname()[1])
