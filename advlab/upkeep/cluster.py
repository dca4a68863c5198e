"""The one engine that computes: a Dask cluster, of this machine's cores or any other that runs.

Whoever reaches a scheduler can run code on its workers. Ours therefore listens on loopback alone,
and speaks TLS with keys that are made for the run and known to nobody else. Another scheduler must
speak TLS, too, unless its user says that it need not.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import forkserver, get_all_start_methods
from pathlib import Path
from threading import Event, Thread
from typing import Any

import dask
from distributed import Client, Future, LocalCluster, Security
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.core import Status
from distributed.utils import get_mp_context
from tqdm import tqdm

from advlab import files
from advlab.machine import cores
from advlab.upkeep import tasks
from advlab.upkeep.processes import KEEP_MEMORY, environment, kill_children

SECONDS = 30  # for a scheduler to answer, and for a first worker to be there
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ENVIRONMENT = dict.fromkeys(THREADS, "1") | KEEP_MEMORY
# Where the system can, workers are forked from a process that has imported all that they need: they
# start at once, and share that memory.
FORK = "forkserver" in get_all_start_methods()
DASHBOARD = find_spec("bokeh") is not None
MEMORY = ("target", "spill", "pause", "terminate")
LOCAL: dict[str, Any] = {
    "distributed.nanny.pre-spawn-environ": ENVIRONMENT,
    "distributed.worker.multiprocessing-method": "forkserver" if FORK else "spawn",
    # A training takes the memory that it takes: there is nothing to spill, and no use in pausing.
    **{f"distributed.worker.memory.{at}": False for at in MEMORY},
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",  # the usual 20 ms cost a process 2 % of a core
    "distributed.scheduler.allowed-failures": 2,  # so often a task may lose its worker
    # One task a worker, the others wait: what kills its worker takes nobody else's with it.
    "distributed.scheduler.worker-saturation": 1.0,
    # Pages about the cluster, for whoever asks: without the dashboard there are none.
    **{f"distributed.{kind}.http.routes": [] for kind in ("worker", "nanny")},
    **({} if DASHBOARD else {"distributed.scheduler.http.routes": []}),
}


class ClusterError(RuntimeError):
    """A cluster that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Scheduler:
    """Which cluster is to compute.

    Args:
        address: Of a running scheduler, "tls://HOST:8786"; "auto": ADVLAB_SCHEDULER, or else a
            cluster of this machine's own.
        tls_ca, tls_cert, tls_key: Files that show who may use it; None: as Dask is configured.
        insecure: Accept a scheduler without TLS.
    """

    address: str = "auto"
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = False

    def resolved(self) -> str | None:
        """Return the address; None for a cluster of this machine's own.

        Raises:
            ClusterError: if it is no address, or without TLS.
        """
        address = files.setting(self.address, "ADVLAB_SCHEDULER", "auto")
        if address == "auto":
            return None
        kind, _, rest = address.partition("://")
        if kind not in ("tls", "tcp") or not rest:
            raise ClusterError(f"scheduler {address!r} is no address; it is like tls://HOST:8786")
        if kind == "tcp" and not self.insecure:
            raise ClusterError(
                f"scheduler {address} speaks no TLS: whoever reaches it can run code as you. Start "
                "it with TLS and give --tls-ca, --tls-cert and --tls-key, or accept that with "
                "--insecure"
            )
        return address

    def security(self) -> Security:
        """Return the keys for a scheduler that is running already.

        Raises:
            ClusterError: if there is no such file.
        """
        given = {
            "tls_ca_file": self.tls_ca,
            "tls_client_cert": self.tls_cert,
            "tls_client_key": self.tls_key,
        }
        found = {name: path for name, path in given.items() if path}
        for name, path in found.items():
            if not Path(path).is_file():
                raise ClusterError(f"there is no file {path} ({name})")
        return Security(require_encryption=not self.insecure, **found)


@dataclass(frozen=True)
class Cluster:
    """A cluster that is ready to compute.

    Args:
        client: What tasks are sent with.
        shared: Whether its workers share this machine's disk: those of its own cluster do.
    """

    client: Client
    shared: bool
    _places: dict[str, tasks.Place] = field(default_factory=dict)

    def place(self, options: tasks.Options) -> tasks.Place:
        """Return where tasks of a run keep their files, when each worker has opened its data.

        Raises:
            ClusterError: names the workers that cannot.
        """
        opened = options.open()
        token = "" if self.shared else tasks.token_of(opened.zoo.folder)
        place = tasks.Place(token, opened.data.md5)
        if not self.shared and token not in self._places:
            found = self.ask_all(tasks.open_data, place, options)
            _refuse({w: f"cannot open {opened.data.name}: {e}" for w, e in found.items() if e})
            self._places[token] = place
        return place

    def clear(self) -> None:
        """Remove what the workers have kept of this run for a later one to go on with."""
        for place in self._places.values():
            self.ask_all(tasks.clear, place)

    def release(self) -> None:
        """End the workers of an own cluster: they hold memory, and there is nothing left to do."""
        if self.client.cluster:
            self.client.cluster.scale(0)

    def file(self, path: Any) -> tasks.File:
        """Return a file of this machine as a task can have it."""
        return tasks.File(path, None if self.shared else path.read_bytes())

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield what `function` makes of each item, in their order."""
        sent = [self.client.submit(function, item, pure=False) for item in items]
        return map(self.result, sent)

    def ask_all(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Return what `function` returns, or raises, on each worker, by address; at once."""
        return self.client.run(function, *arguments, on_error="return")

    def result(self, future: Future) -> Any:
        """Return what a task returns, or raise what it raised.

        Raises:
            ClusterError: if the scheduler is gone.
        """
        try:
            return future.result()
        except FutureCancelledError as error:
            if error.reason != "scheduler-connection-lost":
                raise
            raise ClusterError(f"the scheduler {self.client.scheduler.address} is gone") from error


@contextmanager
def connect(asked: Scheduler | None = None, jobs: int | None = None) -> Iterator[Cluster]:
    """Yield a cluster whose workers run the same code as this process.

    When the block is left by an error or an interruption, what runs is stopped at once.

    Args:
        asked: Which cluster; None for one of this machine's own.
        jobs: Workers of an own cluster; None for one a core.

    Raises:
        ClusterError: if the scheduler does not answer, has no worker, may not be used, or a worker
            has another version of advlab or torch.
    """
    asked = asked or Scheduler()
    address = asked.resolved()
    for name in ("distributed", "distributed.client"):  # which has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    opened = _own(jobs or cores()) if address is None else _running(address, asked)
    files_travel = {"distributed.admin.large-graph-warning-threshold": "1GB"}
    with dask.config.set(files_travel), opened as client:
        cluster = Cluster(client, shared=address is None)
        _check_versions(cluster)
        if DASHBOARD and "dashboard" in client.scheduler_info()["services"]:
            tqdm.write(f"dashboard of the cluster: {client.dashboard_link}")
        yield cluster
        cluster.clear()


@contextmanager
def _short_folder() -> Iterator[None]:
    """Make temporary files inside in a folder whose path is short enough for sockets."""
    from advlab.upkeep.kernels import short_folder  # with Jupyter, which few commands need

    usual = tempfile.gettempdir()
    tempfile.tempdir = short_folder(usual)
    try:
        yield
    finally:
        tempfile.tempdir = usual


@contextmanager
def _own(workers: int) -> Iterator[Client]:
    with dask.config.set(LOCAL), environment(**ENVIRONMENT):
        if FORK:
            get_mp_context()  # sets what Dask would import there
            forkserver.set_forkserver_preload(["distributed", "torch._dynamo", tasks.__name__])
            with _short_folder():  # its socket lies in the one for temporary files
                forkserver.ensure_running()
        started = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            security=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=None,
            # As it is now: what workers are forked from may have been started under another.
            env=dict.fromkeys(files.SETTINGS, "") | dict(os.environ),
            silence_logs=logging.CRITICAL,
        )
        client = Client(started)
        try:
            yield client
        except BaseException:
            # A worker ends when its task does, and a training takes hours.
            start_no_more(client)
            kill_children()
            raise
        finally:
            client.close()
            started.close()


def start_no_more(client: Client) -> None:
    """Let no worker of an own cluster be started in place of one that ends from now on."""
    for nanny in client.cluster.workers.values() if client.cluster else ():
        nanny.status = Status.closing_gracefully


@contextmanager
def _running(address: str, asked: Scheduler) -> Iterator[Client]:
    try:
        client = Client(address, security=asked.security(), timeout=SECONDS)
    except TypeError as error:
        raise ClusterError(
            f"the scheduler {address} speaks TLS, and there are no keys: give --tls-ca, --tls-cert "
            "and --tls-key, or set them in Dask's configuration"
        ) from error
    except (OSError, TimeoutError, ValueError, CommClosedError) as error:
        raise ClusterError(
            f"the scheduler {address} does not answer, or refuses these keys ({error}). Is it "
            "running, and does it speak TLS with the same certificate authority?"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=SECONDS)
        except TimeoutError as error:
            raise ClusterError(f"the scheduler {address} has no worker; start one") from error
        left = Event()
        Thread(target=_say_when_alone, args=(client, left), daemon=True).start()
        try:
            yield client
        finally:
            left.set()


def _say_when_alone(client: Client, left: Event) -> None:
    """Say so when no worker is there any more: what is to be computed waits for one."""
    alone = False
    while not left.wait(SECONDS / 3):
        before = alone
        with suppress(OSError):  # a scheduler that is gone is told of by who waits for a result
            alone = client.status == "running" and not client.scheduler_info()["workers"]
        if alone and not before:
            tqdm.write(
                f"The scheduler {client.scheduler.address} has no worker left. Start one and this "
                "goes on, or stop it with Ctrl-C and go on later with --resume"
            )


def _check_versions(cluster: Cluster) -> None:
    own, said = tasks.about(), {}
    for where, found in cluster.ask_all(tasks.about).items():
        if isinstance(found, Exception):
            said[where] = f"cannot run advlab: {found!r}. Install it there"
        elif differs := tasks.difference(found, own):
            said[where] = f"has {differs}; install the same on all machines"
    _refuse(said)


def _refuse(said: Mapping[str, str]) -> None:
    """Raise a ClusterError that names workers, if there is anything said of them."""
    if said:
        raise ClusterError("; ".join(f"worker {where} {what}" for where, what in said.items()))
