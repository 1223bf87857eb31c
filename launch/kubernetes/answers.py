"""What the API server answers, or that it does not, in one line."""

import json
from contextlib import contextmanager
from typing import Iterator

from kubernetes.client.rest import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    SSLError,
)
from yaml import YAMLError

from fuxi_torchrec.errors import UserError, one_line

NOT_CONNECTED = (ConnectTimeoutError, NameResolutionError, NewConnectionError, ProxyError, SSLError)
UNREADABLE = (ConfigException, YAMLError, OSError)
"""What reading the kubeconfig raises."""
MOST = 600  # characters: a webhook tells every task's mistake


def words(error: ApiException) -> str:
    """Returns the server's own words: the message of its answer, else the answer itself or HTTP's word for its number."""
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else error.body or ""
    try:
        return one_line(json.loads(body)["message"], MOST).rstrip("; ")  # Volcano ends its own with a semicolon
    except (ValueError, TypeError, KeyError):
        pass
    short = body if 0 < len(body) < MOST and "<" not in body else f"{error.status} {error.reason}"
    # Only a path that the server does not know is answered without an object of its own.
    return one_line(short, MOST) + ("; is Volcano installed there?" if error.status == 404 else "")


def silence(error: HTTPError) -> str:
    """Returns why no answer came: the innermost reason, with the address where urllib3 tells it."""
    reason: Exception = error
    while inner := [inner for inner in (*vars(reason).values(), *reason.args) if isinstance(inner, Exception)]:
        reason = inner[0]
    pool = getattr(error, "pool", None)
    address = f"{pool.host}:{pool.port}: " if pool is not None else ""
    return address + one_line(str(reason).rpartition(">: ")[2])


def was_sent(error: HTTPError) -> bool:
    """Tells whether the request may have reached the server: not where no connection came about."""
    return not isinstance(getattr(error, "reason", error), NOT_CONNECTED)


@contextmanager
def told(afterwards: str, instead: str = "") -> Iterator[None]:
    """Turns the server's refusal, or its silence, into a UserError.

    Args:
        afterwards: what is then the case, as "nothing was submitted".
        instead: what works without a server.
    """
    look = f"{afterwards}; look at kubectl config{instead and ', or ' + instead}"
    try:
        yield
    except ApiException as error:
        if not error.status:  # the client's own, of a connection that is not secure
            raise UserError(f"Kubernetes does not answer ({one_line(error.reason)}); {look}") from error
        raise UserError(f"Kubernetes answers: {words(error)}; {afterwards}") from error
    except HTTPError as error:
        raise UserError(f"Kubernetes does not answer ({silence(error)}); {look}") from error
    except UNREADABLE as error:
        raise UserError(f"no Kubernetes cluster is configured ({one_line(error)}); {look}") from error
