"""TorchX's commands in this process, against the API server that a kubeconfig names."""

import re

from kubernetes.config import kube_config
from torchx.cli.main import main


def use(server, monkeypatch, folder, namespace=None):
    """Makes the server the one that kubectl would ask."""
    path = str(server.kubeconfig(folder / "kubeconfig", namespace))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", path)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", path)  # read when it was imported


def torchx(capsys, *words):
    """Exit code, printed lines and complaints of a command."""
    capsys.readouterr()
    try:
        main([*words])
        code = 0
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    complaints = [line for line in said.err.splitlines() if not re.match(r".*torchx.* INFO ", line)]
    return code, said.out, complaints
