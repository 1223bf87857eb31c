"""Submitting to Kubernetes: what an API server answers is told in its words, and a job that is there is never denied."""

import json
import shlex

import pytest
from kubernetes.config import kube_config
from torchx.cli.argparse_util import torchxconfig
from torchx.cli.main import create_parser, get_sub_cmds
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES, get_scheduler_factories

from launch.kubernetes import namespace, submission
from tests.helpers.api_server import DROPPED, ApiServer, forbidden, status
from tests.helpers.kubectl import torchx, use

pytestmark = pytest.mark.thorough

WORDS = (
    'launch/components.py:prepare --image i:1 --mounts type=volume,src=claim,dst=/data synthetic --users 100 --items 50 '
    "--events-per-user 20 --output /data/made"
)  # fmt: skip
BOTH = pytest.mark.parametrize("validated", [True, False])


@pytest.fixture
def server(here, monkeypatch):
    monkeypatch.setattr(submission, "PAUSES", (0.0, 0.0))
    with ApiServer() as server:
        use(server, monkeypatch, here)
        yield server


def submit(capsys, validated=True, cfg="namespace=ml", queue="research", options=()):
    cfg = f"queue={queue}{cfg and ',' + cfg},validate_spec={validated}"
    words = ["run", "-s", "kubernetes", "--workspace", "", "-cfg", cfg, *options, *shlex.split(WORDS)]
    return torchx(capsys, *words)


@BOTH
def test_a_job_is_submitted_once_and_its_handle_printed(server, capsys, validated):
    code, printed, complaints = submit(capsys, validated)
    ((_, name),) = server.jobs
    assert (code, complaints, printed.split()[0]) == (0, [], f"kubernetes://torchx/ml:{name}")
    posts = [dry for method, _, dry in server.asked if method == "POST"]
    assert posts == ([True, False] if validated else [False])


REFUSALS = {
    "no such namespace": ({"cfg": "namespace=nowhere"}, None, 'namespaces "nowhere" not found'),
    "no such queue": ({"queue": "none"}, None, 'unable to find job queue: queue.scheduling.volcano.sh "none" not found'),
    "no right": ({}, forbidden("create", "jobs"), 'User "ann" cannot create resource "jobs"'),
    "no token": ({}, status(401, "Unauthorized", "Unauthorized"), "Kubernetes answers: Unauthorized"),
    "no Volcano": ({}, (404, "404 page not found\n"), "404 page not found; is Volcano installed there?"),
    "a webhook": ({}, status(400, "BadRequest", "denied the request: no such queue;"), "denied the request: no such queue; n"),
    "a gateway's page": ({}, (403, "<html>no</html>"), "403 Forbidden"),
    "a conflict of another kind": ({}, status(409, "Conflict", "quota: modified, try again"), "quota: modified, try again"),
    "a server that fails": ({}, status(500, "InternalError", "failed calling webhook: no endpoints"), "no endpoints"),
}


@BOTH
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_the_server_says_is_told_in_one_line(server, capsys, refusal, validated):
    how, answer, says = REFUSALS[refusal]
    if answer:
        server.instead("POST", "/jobs$", answer)
    code, printed, complaints = submit(capsys, validated, **how)
    assert code == 2 and len(complaints) == 1 and not server.jobs and "kubernetes://" not in printed
    assert complaints[0].startswith("error: Kubernetes answers: ") and says in complaints[0]
    assert complaints[0].endswith("; nothing was submitted")


@BOTH
def test_a_server_that_does_not_answer_is_told_so(server, capsys, validated):
    server.stop()
    code, _, (complaint,) = submit(capsys, validated)
    assert code == 2 and complaint.startswith("error: Kubernetes does not answer (127.0.0.1:")
    assert "Connection refused" in complaint and "nothing was submitted" in complaint


@pytest.mark.parametrize("text", [None, "a: [", "just words", "[1, 2]", "contexts: 3", " "])
def test_without_a_configuration_that_can_be_read_it_is_told_so(server, capsys, monkeypatch, here, text):
    file = here / "other"
    if text:
        file.write_text(text)
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    code, _, (complaint,) = submit(capsys, cfg="")
    assert code == 2 and "no Kubernetes cluster is configured" in complaint and "--dryrun" in complaint


LOOKS = {"no right to look": forbidden("get", "jobs/status"), "no connection": DROPPED, "an error": (503, "later")}


@BOTH
@pytest.mark.parametrize("look", LOOKS)
def test_a_job_that_cannot_be_looked_at_is_submitted_all_the_same(server, capsys, look, validated):
    """A script that tries again after an error would start it twice."""
    server.instead("GET", "/status$", LOOKS[look])
    code, printed, complaints = submit(capsys, validated)
    ((_, name),) = server.jobs
    assert code == 0 and printed.split()[0] == f"kubernetes://torchx/ml:{name}"
    assert len(complaints) == 1 and complaints[0].startswith(f"the job is submitted: ml:{name}. Kubernetes ")


def test_programs_get_the_handle_of_such_a_job_as_json(server, capsys):
    server.instead("GET", "/status$", forbidden("get", "jobs/status"))
    code, printed, _ = submit(capsys, options=["--json"])
    ((_, name),) = server.jobs
    assert code == 0 and json.loads(printed)["handle"] == f"kubernetes://torchx/ml:{name}"


def test_to_wait_for_such_a_job_fails_as_a_job_does_and_not_as_a_mistake(server, capsys):
    server.instead("GET", "/status$", forbidden("get", "jobs/status"))
    code, _, complaints = submit(capsys, options=["--wait"])
    assert code == 1 and complaints[0].startswith("the job is submitted") and "is not known" in complaints[-1]
    assert len(server.jobs) == 1


@BOTH
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("answer", [DROPPED, status(504, "Timeout", "request did not complete")], ids=["lost", "timeout"])
def test_a_lost_answer_is_asked_for_again_and_there_is_one_job(server, capsys, answer, kept, validated):
    server.instead("POST", "/jobs$", answer, times=1, kept=kept, dry=False)
    code, printed, complaints = submit(capsys, validated)
    ((_, name),) = server.jobs
    assert (code, complaints, printed.split()[0]) == (0, [], f"kubernetes://torchx/ml:{name}")


def test_a_job_that_the_server_keeps_but_never_confirms_is_found(server, capsys):
    server.instead("POST", "/jobs$", status(500, "InternalError", "etcdserver: request timed out"), kept=True, dry=False)
    code, _, complaints = submit(capsys)
    assert (code, complaints, len(server.jobs)) == (0, [], 1)


def test_what_cannot_be_known_is_not_claimed(server, capsys):
    server.instead("POST", "/jobs$", DROPPED, kept=True, dry=False)
    server.instead("GET", "/jobs/", forbidden("get", "jobs"))
    code, _, (complaint,) = submit(capsys)
    assert code == 2 and "whether the job was submitted is not known: look by kubectl -n ml get vcjob prepare-" in complaint
    assert "nothing was submitted" not in complaint and "Kubernetes: Remote end closed connection" in complaint


def test_the_namespace_is_the_contexts_where_none_is_named(server, capsys, monkeypatch, here):
    use(server, monkeypatch, here, "ml")
    code, printed, _ = submit(capsys, cfg="")
    ((where, name),) = server.jobs
    assert code == 0 and where == "ml"
    assert "namespace: ml" in submit(capsys, cfg="", options=["--dryrun"])[1]
    assert f"kubernetes://torchx/ml:{name}" in torchx(capsys, "list", "-s", "kubernetes")[1]
    use(server, monkeypatch, here)
    submit(capsys, cfg="")
    assert {where for where, _ in server.jobs} == {"ml", "default"}


def test_inside_a_pod_it_is_the_service_accounts(tmp_path, monkeypatch):
    (tmp_path / "namespace").write_text("team\n")
    monkeypatch.setattr(namespace, "SERVICE_ACCOUNT", str(tmp_path / "namespace"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert namespace.current_namespace() == "team"


def test_the_other_commands_know_the_job_and_tell_their_mistakes_in_one_line(server, capsys):
    submit(capsys)
    ((_, name),) = server.jobs
    handle = f"kubernetes://torchx/ml:{name}"
    assert "PENDING" in torchx(capsys, "status", handle)[1]
    assert handle in torchx(capsys, "list", "-s", "kubernetes", "-cfg", "namespace=ml")[1]
    assert torchx(capsys, "cancel", handle)[0] == 0
    assert server.jobs["ml", name]["status"]["state"]["phase"] == "Aborted"
    code, _, complaints = torchx(capsys, "log", f"{handle}/prepare/0")
    assert code == 2 and len(complaints) == 1 and f'pods "{name}-prepare-0-0" not found' in complaints[0]
    for method, words in (("GET", ("status",)), ("DELETE", ("delete",))):
        server.instead(method, "/jobs/", forbidden(words[0], "jobs"), times=1)
        code, _, complaints = torchx(capsys, *words, handle)
        assert code in (1, 2) and len(complaints) == 1 and f"cannot {words[0]}" in complaints[0]
    assert torchx(capsys, "delete", handle)[0] == 0 and not server.jobs


def test_a_scheduler_that_this_package_brings_does_not_become_the_default(here, monkeypatch):
    monkeypatch.setattr(torchxconfig, "_subcmd_configs", {})  # TorchX reads them once a process
    monkeypatch.setattr("torchx.runner.config.DEFAULT_CONFIG_DIRS", [])
    parser = create_parser(get_sub_cmds())
    assert next(iter(get_scheduler_factories())) == "kubernetes"
    chosen = [parser.parse_args([command]).scheduler for command in ("run", "list")]
    assert chosen == [next(iter(DEFAULT_SCHEDULER_MODULES))] * 2
