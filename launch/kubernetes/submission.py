"""Submitting a job so that it is known whether there is one, whatever the network does.

A job's name is drawn before it is sent (64 random bits), so the server takes it once: it is sent again where the answer was
lost, and "already exists" says that the lost one had arrived.
"""

import json
import time
from typing import Any, Dict

from kubernetes.client import CustomObjectsApi
from kubernetes.client.rest import ApiException
from urllib3.exceptions import HTTPError

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject
from launch.kubernetes.answers import silence, was_sent, words

JOBS: Dict[str, Any] = {"group": "batch.volcano.sh", "version": "v1alpha1", "plural": "jobs"}
PAUSES = (1.0, 2.0)  # seconds before the second and the third time that a job is sent


def validate(api: CustomObjectsApi, job: JsonObject) -> None:
    """Lets the server judge the job without keeping it. Raises ApiException or HTTPError."""
    api.create_namespaced_custom_object(**JOBS, namespace=job["metadata"]["namespace"], body=job, dry_run="All")


def submit(api: CustomObjectsApi, job: JsonObject) -> None:
    """Submits the job. Raises ApiException or HTTPError where it was not, UserError where that cannot be known."""
    doubt = ""
    for pause in (*PAUSES, 0.0):
        try:
            api.create_namespaced_custom_object(**JOBS, namespace=job["metadata"]["namespace"], body=job)
            return
        except (ApiException, HTTPError) as error:
            if is_there_already(error):
                return
            if not doubt and not is_doubtful(error):
                raise
            doubt = words(error) if isinstance(error, ApiException) else silence(error)
        time.sleep(pause)
    _settle(api, job, doubt)


def is_there_already(error: Exception) -> bool:
    """Tells whether the server has a job of this name: a name of 64 random bits is no other's."""
    return isinstance(error, ApiException) and error.status == 409 and _reason(error) == "AlreadyExists"


def is_doubtful(error: Exception) -> bool:
    """Tells whether the job may have been kept although no answer says so: the connection broke, or the server failed."""
    if isinstance(error, HTTPError):
        return was_sent(error)
    return isinstance(error, ApiException) and (error.status or 0) >= 500


def _settle(api: CustomObjectsApi, job: JsonObject, doubt: str) -> None:
    """Looks whether the job is there, once sending it again has not told."""
    namespace, name = job["metadata"]["namespace"], job["metadata"]["name"]
    try:
        api.get_namespaced_custom_object(**JOBS, namespace=namespace, name=name)
    except ApiException as error:
        if error.status == 404:
            raise UserError(f"Kubernetes answers: {doubt}; nothing was submitted") from None
    except HTTPError:
        pass
    else:
        return
    look = f"kubectl -n {namespace} get vcjob {name}"
    raise UserError(f"Kubernetes: {doubt}; whether the job was submitted is not known: look by {look} before you try again")


def _reason(error: ApiException) -> str:
    try:
        return str(json.loads(error.body or "{}").get("reason"))
    except (ValueError, AttributeError):
        return ""
