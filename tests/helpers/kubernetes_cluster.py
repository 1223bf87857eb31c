"""The cluster that KUBECONFIG names, for tests: TorchX's commands against it, its pods, and what is made there taken away.

What is made there carries a name of its own, `prefix`, so that several people can try at once: every job's command holds
it (in the run folder's name), every other pod's label, and the folder on the claim is called so.
"""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml
from kubernetes import client, config
from kubernetes.client.rest import ApiException
from urllib3.exceptions import HTTPError

ROOT = Path(__file__).parents[2]
TORCHX = [sys.executable, "-m", "torchx.cli.main"]
JOBS = {"group": "batch.volcano.sh", "version": "v1alpha1", "plural": "jobs"}
LABEL = "fuxi-torchrec-test"
ANSWER_SECONDS = 60  # of the server
# Of a job of minutes whose image may have to be pulled first.
JOB_SECONDS = float(os.environ.get("KUBERNETES_JOB_SECONDS", 1200))
ENDED = ("Completed", "Failed", "Aborted", "Terminated")


class Cluster:
    """A namespace and a queue of Volcano's; the test is skipped, with the reason, where there is none."""

    def __init__(self):
        self.namespace = os.environ.get("KUBERNETES_NAMESPACE", "default")
        self.queue = os.environ.get("KUBERNETES_QUEUE", "default")
        self.prefix = f"t{uuid.uuid4().hex[:7]}"
        if not os.environ.get("KUBECONFIG"):
            pytest.skip("KUBECONFIG names no cluster")
        try:
            config.load_kube_config()
            self.pods, self.custom = client.CoreV1Api(), client.CustomObjectsApi()
            self.jobs()
        except (config.ConfigException, HTTPError) as error:
            pytest.skip(f"the cluster of KUBECONFIG does not answer: {str(error)[:200]}")
        except ApiException as error:
            why = "no Volcano" if error.status == 404 else words(error)
            pytest.skip(f"the cluster of KUBECONFIG cannot be used in namespace {self.namespace}: {why}")

    def torchx(self, *arguments, check=True):
        """Runs a command of TorchX's in the repository; its standard output, or with check=False the finished process."""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(
            [*TORCHX, *map(str, arguments)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=3 * ANSWER_SECONDS, check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout if check else done

    def submit(self, component, *arguments):
        """The handle of a job of this component."""
        return self.torchx("run", *self.options(), f"launch/components.py:{component}", *arguments).split()[-1]

    def options(self, **others):
        """`torchx run`'s options for this queue and namespace, or others."""
        values = {"queue": self.queue, "namespace": self.namespace, **others}
        return ["-s", "kubernetes", "--workspace", "", "-cfg", ",".join(f"{key}={value}" for key, value in values.items())]

    def request(self, *arguments):
        """What `torchx run --dryrun`, which asks the server, would submit: a Volcano job."""
        said = self.torchx("run", "--dryrun", *arguments).partition("=== SCHEDULER REQUEST ===\n")[2]
        return yaml.safe_load(said)

    def refused(self, *arguments):
        """The one line by which `torchx run` ends; None where the server takes the job."""
        done = self.torchx("run", *arguments, check=False)
        if done.returncode == 0:
            return None
        said = [line for line in done.stderr.splitlines() if " INFO " not in line]
        assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: "), done
        return said[0]

    def status(self, handle):
        """What `torchx status` says: PENDING, RUNNING, SUCCEEDED, …"""
        said = self.torchx("status", handle, check=False)
        states = re.findall(r"State:\s+(\w+)", said.stdout)
        return states[0] if states else f"no state: {said.stdout}{said.stderr}"

    def listed(self, handle):
        """Whether `torchx list` shows the job."""
        return handle.rpartition("/")[2] in self.torchx("list", "-s", "kubernetes", "-cfg", f"namespace={self.namespace}")

    def jobs(self):
        """The jobs of this trial, each as Volcano keeps it."""
        found = self.custom.list_namespaced_custom_object(namespace=self.namespace, **JOBS, _request_timeout=ANSWER_SECONDS)
        return [job for job in found["items"] if self.prefix in json.dumps(job["spec"])]

    def job(self, handle):
        """One job as Volcano keeps it."""
        return self.custom.get_namespaced_custom_object(
            namespace=self.namespace, name=handle.rpartition(":")[2], **JOBS, _request_timeout=ANSWER_SECONDS
        )

    def pods_of(self, handle):
        """The pods that a job has now."""
        return self.pods.list_namespaced_pod(
            self.namespace, label_selector=f"volcano.sh/job-name={handle.rpartition(':')[2]}", _request_timeout=ANSWER_SECONDS
        ).items

    def wait(self, handle):
        """The state in which a job ended, once Volcano has ended it."""
        phase = lambda: self.job(handle).get("status", {}).get("state", {}).get("phase")  # noqa: E731
        assert until(lambda: phase() in ENDED), self.said(handle)
        return self.status(handle)

    def log(self, name):
        """What a pod printed; nothing while it prints nothing yet."""
        try:
            return self.pods.read_namespaced_pod_log(name, self.namespace, _request_timeout=ANSWER_SECONDS)
        except ApiException:
            return ""

    def said(self, handle):
        """A job's state and the end of what its pods printed, for a failed test."""
        found = [(pod.metadata.name, pod.status.phase) for pod in self.pods_of(handle)]
        pods = [f"== {name} {phase}\n{self.log(name)[-3000:]}" for name, phase in found]
        return "\n".join([json.dumps(self.job(handle).get("status")), *pods])

    def accepts(self, job):
        """Asks the server, without making anything, for a job and for each of its pods; the paths of what it would drop."""
        # Servers older than 1.25 know no strictness: they drop what they do not know.
        only = {"dry_run": "All", "field_validation": "Strict", "_request_timeout": ANSWER_SECONDS}
        lost = dropped(job, self.custom.create_namespaced_custom_object(namespace=self.namespace, body=job, **JOBS, **only))
        for task in job["spec"]["tasks"]:
            template = json.loads(json.dumps(task["template"]))
            template["metadata"]["name"] = f"{job['metadata']['name']}-{task['name']}-0"
            template["spec"].pop("serviceAccountName", None)  # one of the documentation's is not this cluster's
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            answer = self.pods.create_namespaced_pod(self.namespace, pod, **only)
            lost += dropped(pod, self.pods.api_client.sanitize_for_serialization(answer))
        return lost

    def alone(self, image, claim, *command):
        """What a pod printed that ran a command with the claim at /data."""
        name = f"{self.prefix}-{uuid.uuid4().hex[:5]}"
        container = {"name": "main", "image": image, "command": list(command)}
        container["volumeMounts"] = [{"name": "claim", "mountPath": "/data"}]
        volumes = [{"name": "claim", "persistentVolumeClaim": {"claimName": claim}}]
        pod = {"metadata": {"name": name, "labels": {LABEL: self.prefix}}}
        pod["spec"] = {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
        self.pods.create_namespaced_pod(self.namespace, pod)
        phase = lambda: self.pods.read_namespaced_pod(name, self.namespace).status.phase  # noqa: E731
        assert until(lambda: phase() in ("Succeeded", "Failed")), f"{command}: {phase()}"
        ended, said = phase(), self.log(name)
        self.pods.delete_namespaced_pod(name, self.namespace)
        assert ended == "Succeeded", f"{command}: {said}"
        return said

    def clean(self):
        """Deletes the jobs and pods of this trial, and waits for the jobs' own pods to be gone."""
        names = [job["metadata"]["name"] for job in self.jobs()]
        for name in names:
            self.custom.delete_namespaced_custom_object(namespace=self.namespace, name=name, **JOBS)
        until(lambda: not any(self.pods_of(name) for name in names), seconds=200)
        for pod in self.pods.list_namespaced_pod(self.namespace, label_selector=f"{LABEL}={self.prefix}").items:
            self.pods.delete_namespaced_pod(pod.metadata.name, self.namespace)


def words(error):
    """The server's own words for a request that it refused."""
    try:
        return json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def dropped(sent, kept, path=""):
    """The paths of what was sent and is not in what was kept; values that mean nothing (null, {}, false) may go."""
    if isinstance(sent, dict):
        missing = [f"{path}.{key}" for key, value in sent.items() if value and key not in kept]
        both = [(value, kept[key], f"{path}.{key}") for key, value in sent.items() if key in kept]
    elif isinstance(sent, list):
        missing = [] if len(sent) <= len(kept) else [f"{path}[{len(kept)}]"]
        both = [(value, other, f"{path}[{place}]") for place, (value, other) in enumerate(zip(sent, kept))]
    else:
        return []
    return missing + [found for value, other, where in both for found in dropped(value, other, where)]


def until(condition, seconds=JOB_SECONDS, pause=0.5):
    """Waits for condition() to be true; whether it became so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(pause)
    return False
