from collections.abc import Iterator

import pytest

from tests.unit.ui.endpoint import Endpoint, serving


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """One that lists a model for each way to answer."""
    models = ("good@1.0.0", "breaks", "fails", "busy", "short", "silent")
    with serving(Endpoint(models=models)) as endpoint:
        yield endpoint
