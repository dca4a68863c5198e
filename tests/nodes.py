"""Machines for the tests of a cluster: namespaces of Linux on this one machine.

Each has a network address, a host name, a folder and temporary files of its own, and sees those of
no other. All lie on one bridge. Nothing of it is seen from outside, and all of it ends with the
test process, however that ends: nothing has a name, and the kernel kills what is left.
"""

import ctypes
import datetime
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from distributed.security import Security

TESTS = Path(__file__).parent
# Whoever unpickles a function of a test imports the test.
IMPORTED = f"{TESTS.parent}{os.pathsep}{TESTS}"
MORTAL = ("setpriv", "--pdeathsig", "KILL")  # ends with the thread that started it
# The folder that holds those of all machines becomes an empty one with this machine's alone.
BECOME_A_MACHINE = """
set -e
hostname "$1"
ip link set lo up
mount --bind "$2/$1" /mnt
mount -t tmpfs none "$2"
mkdir "$2/$1"
mount --move /mnt "$2/$1"
echo ready
exec sleep infinity
"""


@cache
def why_no_machines() -> str:
    """Return why this system gives us no machines of our own; "" where it does."""
    if not sys.platform.startswith("linux"):
        return "namespaces are Linux's"
    script = f"{BECOME_A_MACHINE.partition('mount')[0]} mount -t tmpfs none /mnt"
    script += "; ip link add br0 type bridge; ip link add name a type veth peer name b"
    command = ["unshare", "--net", "--mount", "--uts", "sh", "-c", script, "sh", "probe"]
    try:
        done = subprocess.run([*MORTAL, *command], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stderr.strip()


def wait_for(condition, what: str, seconds: float = 30.0):
    """Return what `condition` returns as soon as that is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return those of `processes` that run."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
    return found


class Machine:
    """One of the machines.

    Args:
        name: Its host name.
        folder: Of all machines; this one's is ``folder / name``.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder / name
        for part in ("home", "tmp", "data", "python"):
            (self.folder / part).mkdir(parents=True)
        self.credentials: dict[str, str] = {}  # PEM files: "ca-file", "cert" and "key"
        self._started: list[psutil.Popen] = []
        command = ["unshare", "--net", "--mount", "--uts", "sh", "-c", BECOME_A_MACHINE]
        self._holder = subprocess.Popen(
            [*MORTAL, *command, "sh", name, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n", f"no machine {name}"
        self.pid = self._holder.pid

    def _inside(self, *command: str) -> list[str]:
        where = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts"]
        return [*MORTAL, *where, f"--wd={self.folder}", "--", *command]

    def _variables(self, more: Mapping[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("ADVLAB_", "DASK_"))}
        own = {"HOME": "home", "TMPDIR": "tmp", "ADVLAB_CACHE": "cache", "ADVLAB_DATA": "data"}
        own |= {"ADVLAB_OUTPUT": "output"}
        kept |= {variable: str(self.folder / part) for variable, part in own.items()}
        # What lies in the folder "python" is imported first.
        imported = f"{self.folder / 'python'}{os.pathsep}{IMPORTED}"
        return kept | {"PYTHONPATH": imported, "OMP_NUM_THREADS": "1", **more}

    def start(self, *arguments: str, log: str, **variables: str) -> psutil.Popen:
        """Start Python with `arguments` here; what it prints goes to the file `log`."""
        with self.path(log).open("w") as printed:
            process = psutil.Popen(
                self._inside(sys.executable, *arguments),
                env=self._variables(variables),
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def path(self, name: str) -> Path:
        """Return the path of a file here."""
        return self.folder / name

    def shell(self, command: str) -> None:
        """Run a line of shell here."""
        subprocess.run(self._inside("sh", "-ec", command), check=True)

    @contextmanager
    def network(self) -> Iterator[None]:
        """Let this thread, and those that it starts, be in the network of this machine."""
        back, there = (os.open(f"/proc/{pid}/ns/net", os.O_RDONLY) for pid in ("self", self.pid))
        setns = ctypes.CDLL(None, use_errno=True).setns
        try:
            assert setns(there, 0) == 0, os.strerror(ctypes.get_errno())
            yield
        finally:
            assert setns(back, 0) == 0
            os.close(back)
            os.close(there)

    def running(self) -> list[psutil.Process]:
        """Return what runs here, without what only holds the machine."""
        found = alive(self._started)
        return alive([*found, *(child for p in found for child in p.children(recursive=True))])

    def stop(self) -> None:
        """Kill what runs here."""
        for process in self.running():
            process.kill()
        while self._started:
            self._started.pop().wait()

    def close(self) -> None:
        """Let the machine be no more."""
        self.stop()
        self._holder.kill()
        self._holder.communicate()


def look_around(folder: Path) -> tuple[str, list[str], str]:
    """Return the name of this machine, what is in `folder`, and this machine's address."""
    there = sorted(path.name for path in folder.iterdir())
    return socket.gethostname(), there, psutil.net_if_addrs()["eth0"][0].address


# --- credentials


class Authority:
    """Signs certificates."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        self.certificate = self._sign(self._name, self._key, authority=True)

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, authority: bool
    ) -> x509.Certificate:
        day, now = datetime.timedelta(days=1), datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(self._name, name, key.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - day).not_valid_after(now + day)
        kind = x509.BasicConstraints(ca=authority, path_length=None)
        return builder.add_extension(kind, critical=True).sign(self._key, hashes.SHA256())

    def write(self, folder: Path, trusted: "Authority | None" = None) -> dict[str, str]:
        """Write ca.pem, cert.pem and key.pem into `folder`; return their paths by Dask's names.

        Args:
            trusted: Whose certificate ca.pem is; this authority's own by default.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, folder.name)])
        contents = {
            "ca-file": (trusted or self).certificate.public_bytes(pem),
            "cert": self._sign(name, key, authority=False).public_bytes(pem),
            "key": key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for part, content in contents.items():
            (folder / f"{part}.pem").write_bytes(content)
        return {part: str(folder / f"{part}.pem") for part in contents}


def security(paths: Mapping[str, str]) -> Security:
    """Return a client's credentials, from what `Authority.write` returns."""
    names = {"ca-file": "tls_ca_file", "cert": "tls_client_cert", "key": "tls_client_key"}
    return Security(require_encryption=True, **{names[part]: paths[part] for part in names})


# --- a cluster


class Cluster:
    """A scheduler, two machines that work for it and one that asks: their names are below.

    Args:
        folder: For the folders of the machines.
    """

    WORKERS = ("anna", "bert")
    NAMES = ("scheduler", *WORKERS, "client")
    ADDRESS = "tls://10.9.0.1:8786"

    def __init__(self, folder: Path) -> None:
        self._folder, self.authority = folder, Authority()
        self.machines: dict[str, Machine] = {}
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        for number, name in enumerate(self.NAMES, 1):
            machine = self.machines[name] = Machine(name, self._folder)
            machine.credentials = self.authority.write(machine.folder)
            hub = self.machines["scheduler"]
            address = f"ip addr add 10.9.0.{number}/24 dev"
            if machine is hub:
                hub.shell(f"ip link add br0 type bridge; {address} br0; ip link set br0 up")
            else:
                end = f"name eth0 netns {machine.pid}"
                hub.shell(f"ip link add name {name} type veth peer {end}")
                hub.shell(f"ip link set {name} master br0 up")
                machine.shell(f"{address} eth0; ip link set eth0 up")

    def mend(self, workers: int = 2) -> None:
        """Let the scheduler and so many of the two workers run."""
        if not self.machines["scheduler"].running():
            self._start("scheduler", "dask_scheduler", f"--host={self.ADDRESS}", "--no-dashboard")
            self._wait("scheduler", "dask_scheduler", "Scheduler at:")
        stopped = [name for name in self.WORKERS if not self.machines[name].running()]
        self.start_workers(*stopped[: max(workers - len(self.WORKERS) + len(stopped), 0)])

    def start_workers(self, *names: str, **variables: str) -> None:
        """Start a worker of one thread on machines, and return when the scheduler knows them."""
        options = (self.ADDRESS, "--nthreads=1", "--no-nanny")
        for name in names:
            self._start(name, "dask_worker", *options, **variables)
        for name in names:
            self._wait(name, "dask_worker", "Registered to:")

    def _start(self, name: str, module: str, *options: str, **variables: str) -> None:
        machine = self.machines[name]
        tls = [f"--tls-{part}={path}" for part, path in machine.credentials.items()]
        command = ["-m", f"distributed.cli.{module}", *options, *tls]
        machine.start(*command, log=f"{module}.log", **variables)

    def _wait(self, name: str, module: str, sign: str) -> None:
        machine = self.machines[name]

        def said() -> bool:
            text = machine.path(f"{module}.log").read_text()
            assert machine.running(), text
            return sign in text

        wait_for(said, f"{module} on {name}")

    def close(self) -> None:
        """Stop everything."""
        for machine in self.machines.values():
            machine.close()


needs_machines = pytest.mark.skipif(
    bool(why_no_machines()), reason=f"no machines of our own: {why_no_machines()}"
)
