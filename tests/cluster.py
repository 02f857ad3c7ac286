"""A private Slurm cluster of two nodes on this machine, on loopback, for as long as it is needed.

It takes Slurm, munge and MariaDB from the distribution, and has to be root. Nothing outside its
folder is touched but a marked line in /etc/hosts, which is removed in the end.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGES = ["slurm-wlm", "munge", "slurmdbd", "slurm-wlm-mysql-plugin", "mariadb-server"]
PROGRAMS = ["slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db"]
MARK = "# cookiecutter-solver test cluster"
NODES = ["slurmtest1", "slurmtest2"]


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    if not hasattr(os, "getuid") or os.getuid() != 0:
        return "a Slurm cluster of our own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def install() -> None:
    """Get what is missing from a distribution that is like Debian; elsewhere, do nothing."""
    if not missing().startswith("not installed") or shutil.which("apt-get") is None:
        return
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    wanted = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
    for command in (wanted, ["apt-get", "update", "-q"], wanted):
        if subprocess.run(command, env=env, timeout=600).returncode == 0 and command is wanted:
            return


def free_ports(count: int) -> list[int]:
    """Ports in a row that nobody listens at, on loopback."""
    for first in range(26800, 60000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as tried:
                    tried.bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise RuntimeError("no free ports")


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start the cluster, give the environment of its commands, and stop it."""
    for name in ("etc", "state", "spool", "log", "pids", "munge"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "state").chmod(0o700)
    env = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
    hosts = Path("/etc/hosts")
    before = hosts.read_text()
    started: list[int] = []
    try:
        # Dora asks for the address of a job's first node by its name.
        hosts.write_text(f"{before.rstrip()}\n127.0.0.1 {' '.join(NODES)} {MARK}\n")
        _configure(folder, free_ports(5))
        _start(folder, env, started)
        yield env
    finally:
        lines = hosts.read_text().splitlines(keepends=True)
        hosts.write_text("".join(line for line in lines if MARK not in line))
        jobs = _run(["squeue", "-h", "-o", "%A"], env).split()
        if jobs:
            _run(["scancel", *jobs], env)
            _wait(lambda: not _run(["squeue", "-h"], env))  # until they have ended
        _stop(folder, started)


def _configure(folder: Path, ports: list[int]) -> None:
    controller, database, *nodes = ports[:4]
    munge = f"{folder}/munge/munge.socket"
    (folder / "munge" / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge" / "munge.key").chmod(0o600)
    (folder / "etc" / "slurmdbd.conf").write_text(
        f"""AuthType=auth/munge
AuthInfo=socket={munge}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={database}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/pids/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CommunicationParameters=NoInAddrAny
"""
    )
    (folder / "etc" / "slurmdbd.conf").chmod(0o600)
    # Nodes claim more than there is, so that jobs of any size fit. A short life of credentials
    # makes requeued jobs start soon.
    lines = "".join(
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=64 "
        "RealMemory=1000000 State=UNKNOWN\n"
        for name, port in zip(NODES, nodes, strict=True)
    )
    (folder / "etc" / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/pids/slurmctld.pid
SlurmdPidFile={folder}/pids/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=60
CompleteWait=0
ReturnToService=2
JobRequeue=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database}
AccountingStoragePass={munge}
{lines}PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )


def _start(folder: Path, env: dict[str, str], started: list[int]) -> None:
    sock, log = folder / "mysql.sock", folder / "log"
    subprocess.run(
        [
            "munged", "--force", f"--key-file={folder}/munge/munge.key",
            f"--socket={folder}/munge/munge.socket", f"--pid-file={folder}/pids/munged.pid",
            f"--log-file={log}/munged.log", f"--seed-file={folder}/munge/munge.seed",
        ],
        check=True,
    )  # fmt: skip
    install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={folder}/mysql"]
    install += ["--skip-test-db", "--auth-root-authentication-method=socket"]
    with (log / "mariadb.log").open("w") as out:
        subprocess.run(install, stdout=out, stderr=out, check=True)
        server = subprocess.Popen(
            [
                "mariadbd", "--no-defaults", "--user=root", f"--datadir={folder}/mysql",
                f"--socket={sock}", "--skip-networking", "--innodb-buffer-pool-size=64M",
            ],
            stdout=out,
            stderr=out,
            start_new_session=True,
        )  # fmt: skip
    started.append(server.pid)
    ping = ["mariadb-admin", "--no-defaults", f"--socket={sock}", "ping"]
    _wait(lambda: "alive" in _run(ping, env) or server.poll() is not None)
    assert server.poll() is None, (log / "mariadb.log").read_text()
    # Slurm finds the database's socket by this variable.
    subprocess.run(["slurmdbd"], env=env | {"MYSQL_UNIX_PORT": str(sock)}, check=True)
    add = ["sacctmgr", "-i", "-Q", "add", "cluster", "test"]
    listed = ["sacctmgr", "-n", "list", "cluster"]
    _wait(lambda: _succeeds(add, env) or "test" in _run(listed, env))
    subprocess.run(["slurmctld"], env=env, check=True)
    for name in NODES:
        (folder / "spool" / name).mkdir()
        subprocess.run(["slurmd", "-N", name], env=env, check=True)
    idle = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
    _wait(lambda: len(_run(idle, env).split()) == len(NODES))


def _stop(folder: Path, started: list[int]) -> None:
    order = ["slurmd.*", "slurmctld", "slurmdbd", "munged"]
    paths = [path for name in order for path in (folder / "pids").glob(f"{name}.pid")]
    pids = [int(text) for path in paths if (text := path.read_text().strip())]
    for pid in [*pids, *started]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            for _ in range(600):
                if _is_gone(pid):
                    break
                time.sleep(0.1)
            else:
                os.kill(pid, signal.SIGKILL)


def _is_gone(pid: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return not Path(f"/proc/{pid}").exists()


def _run(command: list[str], env: dict[str, str]) -> str:
    """What a command says; nothing if it fails, or hangs, as Slurm's do without a controller."""
    with suppress(subprocess.SubprocessError):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)
        return done.stdout if done.returncode == 0 else ""
    return ""


def _succeeds(command: list[str], env: dict[str, str]) -> bool:
    with suppress(subprocess.SubprocessError):
        return subprocess.run(command, env=env, capture_output=True, timeout=20).returncode == 0
    return False


def _wait(condition: Callable[[], bool]) -> None:
    """Wait for as long as pytest's `timeout` lets us."""
    while not condition():
        time.sleep(0.1)


if __name__ == "__main__":
    install()
    sys.exit(missing() or 0)
