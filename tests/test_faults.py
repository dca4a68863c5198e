"""What goes wrong on a cluster of two machines, and who is kept out of it.

The machines are namespaces (see `nodes`); the processes are real ones.
"""

import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from distributed import Client
from distributed.security import Security
from nodes import Authority, Cluster, alive, needs_machines, wait_for

pytestmark = needs_machines


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """A scheduler, two workers and a client; what a test stops of them stays so."""
    cluster = Cluster(tmp_path_factory.mktemp("machines"))
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(machines):
    """The same with all of them running."""
    machines.mend()
    return machines


def security(paths: dict[str, str] | None) -> Security | None:
    """Return Dask's credentials of PEM files."""
    if paths is None:
        return None
    names = {"ca-file": "tls_ca_file", "cert": "tls_client_cert", "key": "tls_client_key"}
    return Security(require_encryption=True, **{names[part]: paths[part] for part in names})


# --- the machines themselves


def look_around(folder: Path) -> tuple[str, list[str], str]:
    here = sorted(path.name for path in folder.iterdir())
    return socket.gethostname(), here, psutil.net_if_addrs()["eth0"][0].address


def test_machines_see_nothing_of_each_other_but_through_the_network(cluster):
    client = cluster.machines["client"]
    with client.network(), Client(cluster.ADDRESS, security=security(client.credentials)) as asks:
        seen = asks.run(look_around, client.folder.parent)
    expected = [("anna", ["anna"], "10.9.0.2"), ("bert", ["bert"], "10.9.0.3")]
    assert sorted(seen.values()) == expected


@pytest.mark.parametrize("who", ["plain", "another authority", "a forged certificate"])
def test_who_has_no_credentials_gets_nothing(cluster, tmp_path, who):
    address, trusted = cluster.ADDRESS, cluster.authority if who.startswith("a forged") else None
    paths = Authority().write(tmp_path, trusted)
    if who == "plain":
        address, paths = address.replace("tls://", "tcp://"), None
    with cluster.machines["client"].network(), pytest.raises(OSError, match=r"closed|not match"):
        Client(address, security=security(paths), timeout=2)


CRASH = """
import sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
from nodes import Cluster
cluster = Cluster(Path(sys.argv[1]))
cluster.mend()
print("ready", flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_of_machines_whose_test_was_killed(tmp_path):
    command = [sys.executable, "-c", CRASH, str(tmp_path), str(Path(__file__).parent)]
    process = psutil.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    started = process.children(recursive=True)
    assert len(alive(started)) == 7  # four machines, and what runs on three of them
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(started), "no process is left", 5)
