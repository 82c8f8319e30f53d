"""The workflows of GitHub and Azure DevOps: linted, and their own steps run against stand-ins for the services."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.diff.pull_request import LABEL, MARKER, NEEDS_LABEL

ROOT = Path(__file__).parents[3]
GITHUB, AZURE = ROOT / ".github/workflows/config-diff.yml", ROOT / "deploy/azure-devops/config-diff.yml"
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ["zizmor", "--offline", "--persona", "pedantic", str(GITHUB)],
        ["check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(GITHUB)],
        ["check-jsonschema", "--builtin-schema", "vendor.azure-pipelines", "--regex-variant", "python", str(AZURE)],
    ],
    ids=["zizmor", "GitHub's schema", "Azure's schema"],
)
def test_the_linters_have_nothing_to_say(command: list[str]):
    done = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def steps(job: str) -> dict[str, dict[str, Any]]:
    """The steps of a job that have a name."""
    jobs = yaml.safe_load(GITHUB.read_text())["jobs"]
    return {step["name"]: step for step in jobs[job]["steps"] if "name" in step}


def run_step(step: dict[str, Any], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """As a runner does it."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_only_the_job_without_the_pull_requests_code_may_write():
    jobs = yaml.safe_load(GITHUB.read_text())["jobs"]
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "compare": {"contents": "read"},
        "comment": {"pull-requests": "write"},
        "label": {},
    }
    assert not any("checkout" in step.get("uses", "") for step in jobs["comment"]["steps"])
    assert jobs["comment"]["if"] == "github.event.pull_request.head.repo.full_name == github.repository"


@pytest.mark.parametrize("needed", [True, False])
def test_the_step_that_compares_hands_on_the_comment_and_whether_a_label_is_needed(needed: bool, tmp_path: Path):
    comment = "\n".join([MARKER, *([NEEDS_LABEL] if needed else []), "## What", NEEDS_LABEL])  # a third line counts not
    (tmp_path / "comment").write_text(f"{comment}\n")
    script = tmp_path / "scripts" / "config-diff"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\n[ "$1 $2" = "HEAD^1 HEAD" ] && cat comment\n')
    script.chmod(0o755)
    summary, output = tmp_path / "summary", tmp_path / "output"
    output.touch()
    step = steps("compare")["compare"]
    done = run_step(step, tmp_path, GITHUB_STEP_SUMMARY=str(summary), GITHUB_OUTPUT=str(output))
    assert done.returncode == 0, done.stderr
    assert summary.read_text() == (tmp_path / "config-diff.md").read_text() == f"{comment}\n"
    assert output.read_text() == ("needs_label=true\n" if needed else "")


GH = """#!/bin/sh
echo "$*" >> calls
case "$*" in *--jq*) cat found ;; esac
"""


@pytest.mark.parametrize(
    ("found", "method"), [("", "POST repos/o/r/issues/7/comments"), ("31\n32\n", "PATCH repos/o/r/issues/comments/31")]
)
def test_the_comment_is_made_once_and_then_renewed(found: str, method: str, tmp_path: Path):
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "found").write_text(found)
    step = steps("comment")["comment"]
    done = run_step(step, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", REPOSITORY="o/r", NUMBER="7", GH_TOKEN="x")
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert MARKER in first
    assert second == f"api --method {method} -F body=@config-diff.md --silent"


@pytest.mark.parametrize(
    ("needs", "has", "code"), [("true", "false", 1), ("true", "true", 0), ("", "false", 0), ("", "true", 0)]
)
def test_the_label_is_asked_for_where_it_is_needed(needs: str, has: str, code: int, tmp_path: Path):
    done = run_step(steps("label")["label"], tmp_path, NEEDS_LABEL=needs, HAS_LABEL=has)
    assert done.returncode == code
    assert (LABEL in done.stdout) is bool(code)


class Service(BaseHTTPRequestHandler):
    """The part of Azure DevOps that keeps the threads and labels of pull request 7."""

    threads: list[dict[str, Any]]
    labels: list[dict[str, Any]]
    refuses: bool
    asked: list[str]

    def answer(self) -> None:
        data = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        path, _, query = self.path.partition("?")
        assert query == "api-version=7.1"
        assert self.headers["Authorization"] == "Bearer secret"
        self.asked.append(
            f"{self.command} {path.removeprefix('/acme/My%20Team/_apis/git/repositories/r1/pullRequests/7/')}"
        )
        match self.asked[-1].split("/"):
            case _ if self.refuses:
                self.send_error(403)
                return
            case ["POST threads"]:
                self.threads.append({"id": 5, "comments": [{"id": 1, **data["comments"][0]}], "status": data["status"]})
            case ["PATCH threads", _, "comments", _]:
                self.threads[-1]["comments"][0] |= data
        body = json.dumps({"value": self.labels if path.endswith("labels") else self.threads}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = answer  # noqa: N815  the names that http.server calls

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@contextmanager
def service(labels: list[dict[str, Any]], refuses: bool = False) -> Iterator[tuple[type[Service], dict[str, str]]]:
    """A service with another person's thread, and the variables by which a pipeline finds it."""
    other = {"id": 2, "comments": [{"id": 1, "content": "looks good"}]}
    bare = {"id": 3, "comments": [{"id": 1}], "isDeleted": False}
    facts = {"threads": [other, bare], "labels": labels, "refuses": refuses, "asked": []}
    handler = type("Handler", (Service,), facts)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {
            "SYSTEM_COLLECTIONURI": f"http://127.0.0.1:{server.server_port}/acme/",
            "SYSTEM_TEAMPROJECT": "My Team",
            "BUILD_REPOSITORY_ID": "r1",
            "SYSTEM_PULLREQUEST_PULLREQUESTID": "7",
            "SYSTEM_ACCESSTOKEN": "secret",
        }
        yield handler, variables
        server.shutdown()


def post(file: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = ROOT / "deploy/azure-devops/comment.py"
    return subprocess.run(
        [sys.executable, script, file], env=os.environ | variables, capture_output=True, text=True, check=False
    )


def test_azure_has_one_thread_that_is_renewed(tmp_path: Path):
    file = tmp_path / "config-diff.md"
    with service([]) as (handler, variables):
        for content in ("first", "second"):
            file.write_text(f"{MARKER}\n{content}\n")
            done = post(file, variables)
            assert done.returncode == 0, done.stderr
        mine = handler.threads[2:]
        assert handler.asked == [
            "GET threads", "POST threads", "GET labels", "GET threads", "PATCH threads/5/comments/1", "GET labels",
        ]  # fmt: skip
    assert [thread["comments"][0]["content"] for thread in mine] == [f"{MARKER}\nsecond\n"]
    assert mine[0]["status"] == "closed"


@pytest.mark.parametrize(
    ("labels", "code"), [([], 1), ([{"name": LABEL, "active": True}], 0), ([{"name": LABEL, "active": False}], 1)]
)
def test_azure_asks_for_the_label(labels: list[dict[str, Any]], code: int, tmp_path: Path):
    file = tmp_path / "config-diff.md"
    file.write_text(f"{MARKER}\n{NEEDS_LABEL}\nwhat\n")
    with service(labels) as (_, variables):
        done = post(file, variables)
    assert done.returncode == code, done.stderr
    assert (f"add the label {LABEL}" in done.stdout) is bool(code)


def test_azure_says_so_where_the_token_may_not_comment(tmp_path: Path):
    file = tmp_path / "config-diff.md"
    file.write_text(f"{MARKER}\nwhat\n")
    with service([], refuses=True) as (_, variables):
        done = post(file, variables)
    assert done.returncode == 0
    assert "type=warning]the build's token may not comment" in done.stdout
    assert "Contribute to pull requests" in done.stdout
    assert "what" in done.stdout
