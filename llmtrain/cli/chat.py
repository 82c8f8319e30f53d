"""`llmtrain chat [URL ...]`: a page to talk to what an endpoint serves."""

import ipaddress
import os
import sys
from urllib.parse import urlsplit

from llmtrain.cli import UsageError, exits
from llmtrain.cli.flags import Flag, listing, parse

URL = "http://127.0.0.1:8000"
HOST = "127.0.0.1"
PORT = 7860
FLAGS = [
    Flag("--help", "this text", "-h"),
    Flag("--host", f"the address that the page listens on, a loopback one ({HOST})", value="ADDRESS"),
    Flag("--port", f"its port; 0 takes a free one ({PORT})", value="PORT"),
    Flag("--api-key-env", "the environment variable with the key that the endpoints want", value="NAME"),
    Flag("--no-browser", "print the page's address and open nothing"),
]
USAGE = f"""llmtrain chat [FLAG] [URL] ...

  llmtrain chat                                              what {URL} serves
  llmtrain chat http://127.0.0.1:8000 http://127.0.0.1:8001  two endpoints, side by side

A page on your own machine: answers as they are written, each model that an endpoint lists, system message, sampling
settings, one question to two models at the same time. Endpoints are any that speak OpenAI's protocol: `python serve.py`
starts one. Ctrl-C ends the page.
"""


@exits
def main(argv: list[str] | None = None) -> int:
    """Serve the page until it is ended. Endpoints that do not answer end it at once: 75 where trying again may help."""
    flags, urls = parse(sys.argv[1:] if argv is None else argv, FLAGS)
    if "--help" in flags:
        print(USAGE)
        print("\n".join(listing(FLAGS)))
        return 0
    key = flags.get("--api-key-env")
    if key is not None and key not in os.environ:
        raise UsageError(f"--api-key-env: there is no environment variable {key}; `export {key}=...` makes one")
    host, port = _loopback(flags.get("--host", HOST)), _port(flags.get("--port", str(PORT)))
    urls = [_url(url) for url in urls or [URL]]
    from llmtrain.ui.chat import serve

    serve(urls, key, host, port, browser="--no-browser" not in flags)
    return 0


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{text}: no address of an endpoint; write it like {URL}")
    return text


def _loopback(host: str) -> str:
    """The page has no password: who reaches it may use the endpoints, with the key."""
    try:
        inside = host == "localhost" or ipaddress.IPv4Address(host).is_loopback
    except ipaddress.AddressValueError:
        inside = False
    if not inside:
        raise UsageError(
            f"--host: got '{host}', wants 127.0.0.1 or another IPv4 address of loopback, because the page has no "
            f"password; from another machine `ssh -L {PORT}:{HOST}:{PORT} THIS_MACHINE` leads to it"
        )
    return host


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**16:
        raise UsageError(f"--port: got '{text}', wants a number from 0 to {2**16 - 1}")
    return int(text)
