"""A laboratory on one machine: hosts as real daemon processes, each in a network namespace of its own where the rights
allow it, joined by links that can be cut.

    with Lab(directory) as lab:
        a, b = lab.add_host("a"), lab.add_host("b")
        lab.join(a, b)
        ...
        lab.cut(b);  b.kill();  b.start();  lab.mend(b)

Leaving the block ends every daemon and every QEMU of these hosts and removes the namespaces.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import psutil

from hostler.client.client import Client
from hostler.model.errors import HostlerError, InternalError, TimedOut
from hostler.model.requests import JoinRequest
from hostler.testing.failpoints import Failpoints

START_TIMEOUT = 60.0
_LABS = itertools.count()
SUBNET = "10.97.{lab}.{host}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise InternalError(f"command {' '.join(command)}", done.stderr.strip() or f"failed with {done.returncode}")


def _wait_ended(process: psutil.Process) -> None:
    """Until it has ended; whoever inherited it may take seconds to collect what is left of it."""
    end = time.monotonic() + 10
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
            time.sleep(0.01)


class LabHost:
    """One host: a daemon that can be started, stopped and killed, its directories, its API."""

    def __init__(
        self,
        name: str,
        directory: Path,
        listen: str,
        namespace: str | None,
        options: list[str],
        hides: Path | None = None,
    ) -> None:
        self._hides = hides
        self.name = name
        self.directory = directory
        self.state_dir = directory / "s"
        self.run_dir = directory / "r"
        self.namespace = namespace
        self.failpoints = Failpoints(directory / "f")
        self.log = directory / "daemon.log"
        self._listen = listen
        self._options = options
        self.daemon: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        """Its API's unix socket."""
        return str(self.run_dir / "api.sock")

    def client(self, deadline: float = 60.0) -> Client:
        """A client of its API, as root or as whoever runs the lab."""
        return Client(f"unix:{self.socket}", deadline=deadline)

    def start(self) -> None:
        """Start the daemon; returns when its API answers."""
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [
            *self._enter(),
            sys.executable,
            "-m",
            "hostler.testing.daemon",
            f"--state-dir={self.state_dir}",
            f"--run-dir={self.run_dir}",
            f"--listen={self._listen}",
            f"--name={self.name}",
            *self._options,
        ]
        env = {**os.environ, "HOSTLER_TEST_FAILPOINTS": str(self.directory / "f")}
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._wait_ready()

    def _enter(self) -> list[str]:
        """What its daemon is started through. Each of these replaces itself by the next, so the pid is the daemon's."""
        enter = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        if self._hides is not None:
            cover = f'mount -t tmpfs none "{self._hides}" && exec "$@"'
            enter += ["unshare", "--mount", "--propagation", "private", "sh", "-c", cover, "sh"]
        return enter

    def _wait_ready(self) -> None:
        assert self.daemon is not None
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            if self.daemon.poll() is not None:
                raise InternalError(f"host {self.name}", f"its daemon ended at once:\n{self.tail()}")
            with contextlib.suppress(HostlerError), self.client(deadline=5) as client:
                self._keep_address(client)
                return
            time.sleep(0.02)
        raise TimedOut(f"host {self.name}", f"did not answer within {START_TIMEOUT} s:\n{self.tail()}")

    def _keep_address(self, client: Client) -> None:
        """A port that was free at the first start is its own from then on: its peers know the host by it."""
        address = client.hosts.this().address
        if self._listen.endswith(":0") and address:
            self._listen = address

    def tail(self, size: int = 6000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""

    def kill(self) -> None:
        """`kill -9` of the daemon; its QEMUs stay."""
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGKILL)
            self.daemon.wait(30)
            self.daemon = None

    def stop(self) -> None:
        """An orderly stop of the daemon."""
        if self.daemon is not None:
            self.daemon.terminate()
            try:
                self.daemon.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
            self.daemon = None

    def processes(self) -> list[psutil.Process]:
        """Every process, beside the daemon, that works in this host's run directory (QEMU, swtpm, exports)."""
        found = []
        marker = f"{self.run_dir}/"
        for process in psutil.process_iter(["pid", "cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            if marker in line and "hostler.testing.daemon" not in line:
                found.append(process)
        return found

    def qemus(self) -> list[psutil.Process]:
        """Its QEMU processes."""
        return [p for p in self.processes() if "qemu-system" in " ".join(p.cmdline()[:1])]

    def kill_qemus(self) -> None:
        """`kill -9` of every QEMU of this host."""
        for process in self.qemus():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self) -> None:
        """End the daemon and whatever it left running."""
        self.failpoints.clear()
        self.stop()
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in left:
            _wait_ended(process)


def _free_number() -> int:
    """A number for a lab that no other one on this machine has now; different for each of one process."""
    for step in range(250):
        number = (os.getpid() + 37 * next(_LABS) + step) % 250 + 1
        if not Path(f"/sys/class/net/hlab{number}").exists():
            return number
    raise InternalError("lab", "there are 250 labs on this machine", "remove the bridges hlab*")


class Lab:
    """Hosts and the links between them. `isolated` gives each host a namespace (needs root)."""

    def __init__(self, directory: Path, isolated: bool | None = None, number: int | None = None) -> None:
        self.directory = directory
        self.isolated = os.geteuid() == 0 if isolated is None else isolated
        self._number = _free_number() if number is None else number
        self.hosts: list[LabHost] = []

    @property
    def bridge(self) -> str:
        """The bridge that joins the hosts' links, in the namespace of whoever runs the lab."""
        return f"hlab{self._number}"

    def address(self, number: int) -> str:
        """An address of the lab's network: hosts have 1 and up, 100 to 199 are free for guests. Needs `isolated`."""
        return SUBNET.format(lab=self._number, host=number)

    def __enter__(self) -> Self:
        if self.isolated:
            self._remove_network()
            _run("ip", "link", "add", self.bridge, "type", "bridge")
            _run("ip", "addr", "add", SUBNET.format(lab=self._number, host=254) + "/24", "dev", self.bridge)
            _run("ip", "link", "set", self.bridge, "up")
        return self

    def __exit__(self, *_exc: object) -> None:
        for host in self.hosts:
            host.end()
        if self.isolated:
            self._remove_network()

    def _namespace(self, name: str) -> str:
        return f"{self.bridge}-{name}"

    def _remove_network(self) -> None:
        """A namespace goes only when its last process is reaped, so the links are removed by themselves first."""
        for link in Path("/sys/class/net").glob(f"{self.bridge}p*"):
            subprocess.run(["ip", "link", "delete", link.name], check=False, capture_output=True)
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
        for line in listed.splitlines():
            if line.split(" ")[0].startswith(f"{self.bridge}-"):
                subprocess.run(["ip", "netns", "delete", line.split(" ")[0]], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], check=False, capture_output=True)

    def add_host(self, name: str, *options: str, guest_bridge: bool = False, hides: Path | None = None) -> LabHost:
        """A host with its daemon running. `guest_bridge`: with a bridge "br0" in its namespace, joined to the lab's
        bridge, so that its guests are on one network with everybody. `hides`: this host sees an empty directory of its
        own there, as if it did not share that storage (needs root)."""
        number = len(self.hosts) + 1
        address, namespace = "127.0.0.1", None
        if self.isolated:
            address = SUBNET.format(lab=self._number, host=number)
            namespace = self._namespace(name)
            self._wire(namespace, number, address, guest_bridge)
        listen = f"{address}:{0 if not self.isolated else 8690}"
        host = LabHost(name, self.directory / name, listen, namespace, [*options], hides)
        self.hosts.append(host)
        host.start()
        return host

    def _wire(self, namespace: str, number: int, address: str, guest_bridge: bool) -> None:
        outer, inner = f"{self.bridge}p{number}", "eth0"
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", namespace)
        _run("ip", "link", "set", outer, "master", self.bridge, "up")
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        carrier = inner
        if guest_bridge:
            carrier = "br0"
            _run("ip", "-n", namespace, "link", "add", carrier, "type", "bridge")
            _run("ip", "-n", namespace, "link", "set", inner, "master", carrier)
            _run("ip", "-n", namespace, "link", "set", carrier, "up")
        _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", carrier)
        _run("ip", "-n", namespace, "link", "set", inner, "up")

    def join(self, first: LabHost, second: LabHost) -> None:
        """Make two hosts trust each other, as an administrator would."""
        with first.client() as one, second.client() as two:
            two.hosts.join(JoinRequest(invitation=one.hosts.invite().token))

    def cut(self, host: LabHost) -> None:
        """Unplug a host's cable: packets vanish, nobody is told. Needs `isolated`."""
        _run("ip", "link", "set", f"{self.bridge}p{self.hosts.index(host) + 1}", "down")

    def mend(self, host: LabHost) -> None:
        """Plug it in again."""
        _run("ip", "link", "set", f"{self.bridge}p{self.hosts.index(host) + 1}", "up")
