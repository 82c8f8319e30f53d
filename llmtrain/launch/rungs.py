"""The figures of a point on its way, at the tokens where a search compares points."""

import json
from collections.abc import Sequence

from llmtrain.launch.engine import Run
from llmtrain.launch.figures import newest_tokens, rows_of
from llmtrain.launch.study import Study


def has_fallen_behind(study: Study, number: int, runs: Sequence[Run]) -> bool:
    """Report the mean over `runs` at each rung that all of them have passed since the last report; whether the point is
    hopeless by the last of them. A rung's figure is that of the first row from there on."""
    clock = runs[0].directory / "clock.json"
    if not clock.exists():
        return False  # no run has come to its first step
    reported = study.reported(number)
    left = [rung for rung in study.rungs(json.loads(clock.read_text())["tokens"]) if rung > reported]
    if not left or min(newest_tokens(run.directory) for run in runs) < left[0]:
        return False
    rows = [list(rows_of(run.directory, study.sweep.metric)) for run in runs]
    for rung in left:
        passed = [next(((tokens, value) for tokens, value in one if tokens >= rung), None) for one in rows]
        figures = [figure for figure in passed if figure is not None]
        if len(figures) < len(runs):
            return False
        tokens = max(tokens for tokens, _ in figures)
        if tokens <= study.reported(number):
            continue  # one row passed several rungs
        if study.report(number, tokens, sum(value for _, value in figures) / len(figures)):
            return True
    return False
