"""A real SLURM with two nodes, both on this machine, and commands that use it as people do."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.planted import SECRETS, holders

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
KillWait=5
ReturnToService=2
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=16000
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=16000
PartitionName=cpu Nodes={host},{host}-2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm(NamedTuple):
    """environment: of the processes that use it."""

    environment: dict[str, str]

    def __call__(self, *words: str | Path) -> str:
        """What a command says; it has to succeed."""
        done = subprocess.run(list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *words: str | Path) -> "subprocess.Popen[str]":
        """A command of pico, whose words may be read meanwhile."""
        return subprocess.Popen(
            [sys.executable, "-m", "picolm", *map(str, words)], env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def jobs(self) -> dict[str, str]:
        """The state of each job in the queue, by name."""
        lines = self("squeue", "--noheader", "--format=%j %T").splitlines()
        return dict(line.split(" ", 1) for line in lines)

    def number(self, name: str) -> str:
        """The number of the job of that name."""
        return self("squeue", "--noheader", "--format=%A", f"--name={name}").strip()


def wait_for(condition: Callable[[], object], limit_s: float = 240) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The configuration of the running cluster."""
    programs = {name: shutil.which(name, path=PATH) for name in PROGRAMS}
    if os.geteuid() != 0 or None in programs.values():
        pytest.skip("SLURM is not installed, or this is not root: see `make slurm`")
    folder = tmp_path_factory.mktemp("slurm")
    host, conf = socket.gethostname().split(".")[0], folder / "slurm.conf"
    try:
        socket.gethostbyname(host)  # the first process of a job is found by this name
    except OSError:
        pytest.skip(f"the name of this machine, {host}, cannot be looked up: SLURM needs it")
    for name in ("munge", "state", host, f"{host}-2"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    conf.write_text(CONF.format(host=host, folder=folder, ports=_free_ports(3)))
    munge = [
        f"--{name}={folder}/munge/{name.split('-')[0]}"
        for name in ("key-file", "socket", "log-file", "pid-file", "seed-file")
    ]
    with ExitStack() as stack:
        for words in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D", "-f", str(conf)],
            ["slurmd", "-D", "-f", str(conf), "-N", host],
            ["slurmd", "-D", "-f", str(conf), "-N", f"{host}-2"],
        ):
            log = stack.enter_context((folder / f"{words[0]}-{words[-1].rpartition('/')[2]}.log").open("w"))
            process = subprocess.Popen(words, executable=programs[words[0]], stdout=log, stderr=log)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            if words[0] == "munged":
                wait_for((folder / "munge" / "socket").exists, 20)
        environment = os.environ | {"SLURM_CONF": str(conf)}
        if not _are_idle(environment):
            logs = "\n".join(log.read_text()[-500:] for log in folder.glob("*.log"))
            pytest.skip(f"SLURM does not start on this machine: {logs}")
        yield conf
        subprocess.run(["scancel", "--full", "--user=root"], env=environment)
    assert holders(folder) == []


def _are_idle(environment: dict[str, str]) -> bool:
    """Whether both nodes are, before long."""
    ask = ["sinfo", "--noheader", "--Node", "--format=%T"]
    for _ in range(60):
        if subprocess.run(ask, env=environment, capture_output=True, text=True).stdout == "idle\nidle\n":
            return True
        time.sleep(1)
    return False


@pytest.fixture
def slurm(_cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The cluster, with an empty queue before and after, used from `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    own = {"SLURM_CONF": str(_cluster), "PATH": PATH, "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    kept = {name: value for name, value in os.environ.items() if name not in SECRETS}  # SLURM writes it all down
    cluster = Slurm(kept | own)
    yield cluster
    cluster("scancel", "--user=root")
    wait_for(lambda: not cluster.jobs, 30)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
