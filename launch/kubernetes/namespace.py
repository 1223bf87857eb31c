"""The namespace of jobs that name none: the one that kubectl would take."""

import os

from kubernetes.config import incluster_config, list_kube_config_contexts

from launch.kubernetes.answers import UNREADABLE

SERVICE_ACCOUNT = os.path.join(os.path.dirname(incluster_config.SERVICE_TOKEN_FILENAME), "namespace")


def current_namespace() -> str:
    """Returns the service account's namespace inside a pod, else the kubeconfig context's, else "default". (TorchX's client
    looks in the same order.)"""
    if incluster_config.SERVICE_HOST_ENV_NAME in os.environ and os.path.isfile(SERVICE_ACCOUNT):
        with open(SERVICE_ACCOUNT, encoding="utf-8") as file:
            return file.read().strip() or "default"
    try:
        _, context = list_kube_config_contexts()
    except (*UNREADABLE, TypeError, AttributeError):  # told where the server is asked
        return "default"
    return ((context or {}).get("context") or {}).get("namespace") or "default"
