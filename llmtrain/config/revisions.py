"""conf/ as it was in a revision of a git repository: copied into a directory of its own, so that it can be composed."""

import io
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmtrain.config.options import conf_directory
from llmtrain.errors import UserError


@dataclass(frozen=True)
class Tree:
    """Some directories of a repository as they were in one revision."""

    name: str
    """The revision as it was asked for, and its commit."""
    top: Path
    """Where the top of the repository is, or stands in for it."""

    @property
    def conf(self) -> Path:
        """Its `conf/`; the installed one where a repository has only options of its own."""
        own = self.top / "conf"
        return own if (own / "train.yaml").is_file() else conf_directory()


def top_of_repository(directory: Path) -> Path:
    """The top of the repository that holds `directory`. Raises UserError where there is none."""
    done = _git(directory, "rev-parse", "--show-toplevel")
    if done.returncode:
        raise UserError(
            f"{directory} is in no git repository; run it in the one whose conf/ is meant, or compare command lines: "
            f"llmtrain diff OVERRIDES -- OVERRIDES"
        )
    return Path(done.stdout.decode().strip())


def ends_of(text: str, top: Path) -> tuple[str, str | None]:
    """The two revisions of `A..B`; of `A...B` the newest that both have in common, and B; None is the working tree.

    Raises UserError where A is missing or the two have nothing in common.
    """
    dots = "..." if "..." in text else ".."
    first, _, second = text.partition(dots)
    if not first:
        raise UserError(f"{text}: name the revision to compare with; write 'main{dots}{second}'")
    if dots == "...":
        commits = [commit_of(revision, top) for revision in (first, second or "HEAD")]
        done = _git(top, "merge-base", *commits)
        if done.returncode:
            raise UserError(f"{text}: the two have no commit in common; write '{first}..{second}'")
        first = done.stdout.decode().strip()[:12]
    return first, second or None


def commit_of(revision: str, top: Path) -> str:
    """The full name of the commit that `revision` means. Raises UserError where there is none."""
    done = _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if done.returncode:
        raise UserError(
            f"{revision}: no such revision in {top}; `git branch -a` lists branches, and a shallow clone may lack it: "
            f"git fetch --unshallow"
        )
    return done.stdout.decode().strip()


@contextmanager
def tree_of(revision: str | None, top: Path, folders: Iterable[str]) -> Iterator[Tree]:
    """`folders` of the repository at `top` as `revision` had them, those that it had; None is the working tree.

    The directory is gone when the block ends. Raises UserError where the revision does not exist.
    """
    if revision is None:
        yield Tree("the working tree", top)
        return
    commit = commit_of(revision, top)
    with TemporaryDirectory(prefix="llmtrain-revision-") as directory:
        for folder in folders:
            if _git(top, "cat-file", "-e", f"{commit}:{folder}").returncode:
                continue  # it had no such folder
            done = _git(top, "archive", "--format=tar", commit, "--", folder)
            if done.returncode:
                raise UserError(f"git cannot read {folder}/ of {revision}: {done.stderr.decode().strip()}")
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
                archive.extractall(directory, filter="data")
        name = revision if commit.startswith(revision) else f"{revision} ({commit[:9]})"
        yield Tree(name, Path(directory).resolve())


def _git(directory: Path, *words: str) -> "subprocess.CompletedProcess[bytes]":
    try:
        return subprocess.run(["git", "-C", str(directory), *words], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise UserError("git is not installed: install it, or compare runs or command lines") from error
