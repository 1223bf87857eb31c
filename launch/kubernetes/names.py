"""Names of a Volcano job and of all that the cluster derives from it, which Kubernetes limits."""

from fuxi_torchrec.errors import UserError
from fuxi_torchrec.files import JsonObject

LONGEST = 63
"""Characters of a pod's name that can be its host's name too, and of a label's value."""


def check_names(job: JsonObject) -> None:
    """Checks that the pods' names are ones: JOB-TASK-0, the longest that Volcano makes of a job's. Raises UserError.

    The job's own name is its service's and the host names' domain, the config map's is JOB-svc: both are shorter.
    """
    name = job["metadata"]["name"]
    for task in job["spec"]["tasks"]:
        pod = f"{name}-{task['name']}-{task.get('replicas', 1) - 1}"
        if len(pod) > LONGEST:
            raise UserError(f"{pod}: a pod's name may have {LONGEST} characters, this has {len(pod)}; shorten the job's")
