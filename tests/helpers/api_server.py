"""A Kubernetes API server, so far as submitting jobs needs one: over HTTP, on a free port of this machine.

It keeps Volcano's jobs and judges nothing but namespace, queue and names, in the words of the real ones (kube-apiserver and
Volcano's webhook). A test tells it what to answer instead.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml

JOBS = r"/apis/batch\.volcano\.sh/v1alpha1/namespaces/(?P<namespace>[^/]+)/jobs(/(?P<name>[^/]+))?(?P<status>/status)?"
PODS = r"/api/v1/namespaces/(?P<namespace>[^/]+)/pods/(?P<name>[^/]+)(?P<log>/log)?"
DROPPED = object()


def status(code, reason, message):
    """An answer that refuses, as Kubernetes words it."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason, "code": code}
    return code, body


def forbidden(verb, resource):
    user = 'User "ann" cannot'
    return status(403, "Forbidden", f'jobs.batch.volcano.sh is forbidden: {user} {verb} resource "{resource}" in API group')


class ApiServer:
    """Runs while it is entered.

    Attributes:
        jobs: {(namespace, name): job} of those that were submitted.
        pods: {(namespace, name): log}; nobody starts any.
        asked: (method, path, dry run) of every request.
        namespaces, queues: those that there are.
    """

    def __init__(self):
        self.jobs, self.pods, self.asked, self._instead = {}, {}, [], []
        self.namespaces, self.queues = {"ml", "default"}, {"research", "default"}

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.stop()

    def stop(self):
        """Nothing listens any more."""
        self._http.shutdown()
        self._http.server_close()

    def instead(self, method, path, answer, times=-1, kept=False, dry=None):
        """Answers requests otherwise: (code, object or text), or DROPPED, which closes the connection.

        path: a regular expression that is found in it. times: how often; -1: always. kept: after doing what was asked.
        dry: dry runs alone, or all but these.
        """
        self._instead.append({"method": method, "path": path, "answer": answer, "times": times, "kept": kept, "dry": dry})

    def kubeconfig(self, path, namespace=None):
        """Writes a kubeconfig whose context names a namespace or none."""
        context = {"cluster": "c", "user": "u", **({"namespace": namespace} if namespace else {})}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": self.address}}],
            "contexts": [{"name": "x", "context": context}],
            "users": [{"name": "u", "user": {}}],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def answer(self, method, path, body):
        """What a request is answered."""
        parts = urlsplit(path)
        dry = parse_qs(parts.query).get("dryRun") == ["All"]
        self.asked.append((method, parts.path, dry))
        for other in self._instead:
            fits = other["method"] == method and re.search(other["path"], parts.path) and other["dry"] in (None, dry)
            if fits and other["times"]:
                other["times"] -= 1
                if other["kept"]:
                    self._answer(method, parts.path, body, dry)
                return other["answer"]
        return self._answer(method, parts.path, body, dry)

    def _answer(self, method, path, body, dry):
        if found := re.fullmatch(PODS, path):
            pod = found["namespace"], found["name"]
            if pod in self.pods:
                container = {"name": found["name"], "image": "i"}
                return 200, self.pods[pod] if found["log"] else {"spec": {"containers": [container]}, "status": {}}
            return status(404, "NotFound", f'pods "{found["name"]}" not found')
        found = re.fullmatch(JOBS, path)
        if found is None:
            return 404, "404 page not found\n"
        namespace, name = found["namespace"], found["name"]
        if method == "POST":
            return self._create(namespace, body, dry)
        if name is None:
            return 200, {"items": [job for (where, _), job in self.jobs.items() if where == namespace]}
        if (namespace, name) not in self.jobs:
            return status(404, "NotFound", f'jobs.batch.volcano.sh "{name}" not found')
        if method == "PUT":
            self.jobs[namespace, name]["status"] = body["status"]
        return 200, self.jobs.pop((namespace, name)) if method == "DELETE" else self.jobs[namespace, name]

    def _create(self, namespace, job, dry):
        name = job["metadata"]["name"]
        if namespace not in self.namespaces:
            return status(404, "NotFound", f'namespaces "{namespace}" not found')
        if (namespace, name) in self.jobs:
            return status(409, "AlreadyExists", f'jobs.batch.volcano.sh "{name}" already exists')
        if job["spec"]["queue"] not in self.queues:
            missing = f'queue.scheduling.volcano.sh "{job["spec"]["queue"]}" not found'
            denied = 'admission webhook "validatejob.volcano.sh" denied the request'
            return status(400, "BadRequest", f"{denied}: unable to find job queue: {missing}")
        if not dry:
            self.jobs[namespace, name] = {**job, "status": {"state": {"phase": "Pending"}}}
        return 201, job


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of = None

    def _serve(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        answer = self.server_of.answer(self.command, self.path, body)
        if answer is DROPPED:
            self.close_connection = True
            self.connection.close()
            return
        code, content = answer
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, *said):
        pass
