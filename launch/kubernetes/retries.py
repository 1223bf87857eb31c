"""Restarts: what `--max_retries` promises, in Volcano's numbers."""

from contextlib import contextmanager
from typing import Dict, Iterator

from torchx.specs import AppDef

COUNTS_RESTARTS: Dict[str, str] = {"max_retries": "restarts"}
"""Metadata of the applications whose Role.max_retries counts restarts; other people's keep Volcano's meaning."""


@contextmanager
def counted_as_runs(app: AppDef) -> Iterator[None]:
    """Lets Role.max_retries count an application's runs for a moment, as Volcano's maxRetry does.

    Volcano's controller adds one at each failed run and ends the job where the sum is maxRetry: N restarts are N + 1. A
    job without restarts has 1: 0 would be replaced by 3 on the server, and TorchX leaves the policies out that end the
    other pods with the first that fails.
    """
    more = int(all(app.metadata.get(key) == value for key, value in COUNTS_RESTARTS.items()))
    for role in app.roles:
        role.max_retries += more
    try:
        yield
    finally:
        for role in app.roles:
            role.max_retries -= more
