"""Post a file as the one thread of config-diff on an Azure DevOps pull request, and look for the label.

    python comment.py FILE       in a pipeline, which sets the variables that are read here

Ends with 0; with 1 where FILE's second line says that a label is needed and the pull request has not got it. A build
whose token may not comment (of a fork) says so and prints the file. Standard library only: it runs
outside the virtual environment. The API: Azure DevOps REST 7.1, pull request threads, thread comments and labels.
"""

import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 30


def main(file: str) -> int:
    """Post or renew the thread; the exit code says whether the label is missing."""
    content = Path(file).read_text()
    second = [*content.splitlines(), "", ""][1]
    wanted = re.fullmatch(r"<!-- needs the label ([\w-]+) -->", second)
    labels: list[str] = []
    try:
        post(content)
        labels = [label["name"] for label in call("GET", "labels")["value"] if label["active"]]
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise
        print(
            "##vso[task.logissue type=warning]the build's token may not comment: give the project's build service the "
            f"permission `Contribute to pull requests` ({error})\n\n{content}"
        )
    if wanted is None or wanted[1] in labels:
        return 0
    print(
        f"##vso[task.logissue type=error]the mathematics of a pinned experiment change: look at the comment, then add "
        f"the label {wanted[1]} and run again"
    )
    return 1


def post(content: str) -> None:
    """Replace the comment that begins with the same line; make a thread where there is none."""
    marker = content.splitlines()[0]
    for thread in call("GET", "threads")["value"]:
        for first in thread["comments"][:1]:
            if not thread.get("isDeleted") and (first.get("content") or "").startswith(marker):
                call("PATCH", f"threads/{thread['id']}/comments/{first['id']}", {"content": content})
                return
    comment = {"parentCommentId": 0, "content": content, "commentType": "text"}
    call("POST", "threads", {"comments": [comment], "status": "closed"})  # closed: it blocks no completion


def call(method: str, path: str, data: dict[str, Any] | None = None) -> Any:
    """One request about this pull request; raises URLError where it fails."""
    project, repository = (
        urllib.parse.quote(os.environ[name], safe="") for name in ("SYSTEM_TEAMPROJECT", "BUILD_REPOSITORY_ID")
    )
    number = int(os.environ["SYSTEM_PULLREQUEST_PULLREQUESTID"])
    where = f"{project}/_apis/git/repositories/{repository}/pullRequests/{number}/{path}?api-version=7.1"
    request = urllib.request.Request(
        f"{os.environ['SYSTEM_COLLECTIONURI'].rstrip('/')}/{where}",
        method=method,
        data=None if data is None else json.dumps(data).encode(),
        headers={"Authorization": f"Bearer {os.environ['SYSTEM_ACCESSTOKEN']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
