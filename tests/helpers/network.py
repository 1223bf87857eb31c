"""A network of several hosts on one machine, whose cables can be pulled: a network namespace a host, and a bridge between."""

import os
import subprocess

INTERFACE = "fuxi0"


class Host:
    """One host: `enter` are the words before a command that runs it there, `environment` what gloo needs there."""

    def __init__(self, name, address):
        self.name, self.address = name, address
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name)
        self.enter = ("nsenter", f"--net=/run/netns/{name}", *named)
        self.environment = {"GLOO_SOCKET_IFNAME": INTERFACE, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class Network:
    """Hosts that reach each other until one is cut off; a context manager. Needs root (`lacks` says what is missing)."""

    def __init__(self, size=2):
        self.switch = f"fuxi-{os.getpid()}"
        self.hosts = [Host(f"{self.switch}-{number}", f"10.213.0.{number + 1}") for number in range(size)]

    def __enter__(self):
        try:
            _ip("netns", "add", self.switch)
            _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "bridge", "up")
            for host in self.hosts:
                self._connect(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        for name in (self.switch, *(host.name for host in self.hosts)):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _connect(self, host):
        port = f"to-{host.address.rpartition('.')[2]}"
        _ip("netns", "add", host.name)
        _ip("link", "add", INTERFACE, "netns", host.name, "type", "veth", "peer", "name", port, "netns", self.switch)
        _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        for interface in (INTERFACE, "lo"):
            _ip("-n", host.name, "link", "set", interface, "up")

    def cut(self, host):
        """What is sent from and to the host is lost from here on, and nobody is told: its own link stays up."""
        _ip("-n", self.switch, "link", "set", f"to-{host.address.rpartition('.')[2]}", "nomaster")

    def mend(self, host):
        """The host is reached again."""
        _ip("-n", self.switch, "link", "set", f"to-{host.address.rpartition('.')[2]}", "master", "bridge")


def lacks():
    """Why no such network can be made here; None where it can."""
    try:
        with Network(1):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        return f"network namespaces, which need root and iproute2: {said}"


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
