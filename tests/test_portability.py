"""The package imports where Linux's own names do not exist. It is run on Linux; macOS and Windows are only imitated here."""

import subprocess
import sys

import pytest

# Everything is imported twice: first as it is, so that other packages are there; then without the names.
CODE = """
import importlib, os, pkgutil, signal, sys

def import_all():
    import picolm
    names = [module.name for module in pkgutil.walk_packages(picolm.__path__, "picolm.")]
    return [importlib.import_module(name).__name__ for name in names if name != "picolm.__main__"]

import_all()
for name in [name for name in sys.modules if name.split(".")[0] == "picolm"]:
    del sys.modules[name]
for name in ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "posix"):
    sys.modules[name] = None
for module, names in {
    os: "sched_getaffinity O_NOFOLLOW O_NONBLOCK O_DIRECTORY O_CLOEXEC getloadavg getuid geteuid fork register_at_fork killpg"
        " setsid pread pwrite mkfifo sysconf uname",
    signal: "SIGUSR1 SIGUSR2 SIGKILL SIGHUP SIGALRM SIGCHLD SIGPIPE alarm setitimer pthread_sigmask",
}.items():
    for name in names.split():
        delattr(module, name)
print(*import_all())
"""


@pytest.mark.slow
def test_every_module_imports_without_the_names_of_linux() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"picolm.store.files", "picolm.suite.cluster", "picolm.train.resources"} <= set(done.stdout.split())
