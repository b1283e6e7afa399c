"""Start the server of the page: bind, print the address, open the browser, serve until Ctrl-C."""

import ipaddress
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from picolm.console import say
from picolm.errors import PicoError
from picolm.store.manifest import RUN

BACKLOG = 256  # connections that wait
NICE = 10  # beside a training: about a tenth of a core that both want
EVERYWHERE = ("0.0.0.0", "::")
OPEN = "They also compute on this machine, and the connection is not encrypted."


def serve(
    places: Sequence[str], *, host: str = "127.0.0.1", port: int = 0, remote: bool = False, browser: bool = True,
    analyses: Sequence[str] = (), beside: int | None = None,
) -> None:  # fmt: skip
    """Serve the page of runs until the process is interrupted.

    remote: whether `host` may be an address that other machines reach. Raises PicoError for a place without a run, an address
    that cannot be bound, and where the packages are missing.
    """
    require_loopback(host, remote)
    bound = bind(host, port)
    port = bound.getsockname()[1]
    server, token = _server(places, analyses, host, port, remote)
    address = f"http://{_shown(host) if host not in EVERYWHERE else socket.gethostname()}:{port}/{token}/"
    if remote:
        say(f"Who knows this address can read the runs from other machines. {OPEN}", error=True)
    say(f"Pico view: {address}")
    if browser and _has_screen():
        webbrowser.open(address)
    if beside is not None:
        threading.Thread(target=_end_with, args=(server, beside), daemon=True).start()
    server.run(sockets=[bound])


@contextmanager
def beside(run: Path, trust: bool) -> Iterator[None]:
    """Serve the page of a run that this process trains, from a process of its own, until the block ends.

    Raises PicoError where the packages are missing.
    """
    _packages()
    words = [sys.executable, "-m", "picolm", "view", str(run), "--beside", str(os.getpid())]
    server = subprocess.Popen([*words, *(["--trust-remote-code"] if trust else [])], stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_beside(places: Sequence[str], process: int) -> None:
    """Wait until a run is there, and lower the priority of this process. Exits when the process that trains it is gone.

    What the server needs is imported before: at a low priority beside a busy training that would take minutes.
    """
    _packages()
    import picolm.view.server  # noqa: F401

    while not all((Path(place) / RUN).exists() for place in places):
        if os.getppid() != process:
            raise SystemExit(0)
        time.sleep(0.2)
    os.nice(NICE)


def _end_with(server: Any, process: int) -> None:
    """End a server when its parent is gone: also one that was killed."""
    while os.getppid() == process:
        time.sleep(0.5)
    server.handle_exit(signal.SIGTERM, None)


def _server(places: Sequence[str], analyses: Sequence[str], host: str, port: int, remote: bool) -> tuple[Any, str]:
    uvicorn = _packages()
    from picolm.view.guard import Guard, hosts_of
    from picolm.view.server import application
    from picolm.view.session import Session

    logging.getLogger("uvicorn.error").setLevel("ERROR")  # noise on the port is no news
    token = secrets.token_urlsafe(24)
    app = application(Session(places, analyses=analyses))
    guard = Guard(app, token, hosts_of(_shown(host), remote), port, any_address=remote)
    config = uvicorn.Config(
        guard, http="h11", ws="none", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=2,
        backlog=BACKLOG,
    )  # fmt: skip

    class Server(uvicorn.Server):  # type: ignore[name-defined]
        """A server that ends its streams when it is to end."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.routes.stop()
            super().handle_exit(sig, frame)

    return Server(config), token


def _packages() -> Any:
    """Return uvicorn. Raises PicoError where it, or what else the page needs, is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise PicoError("pico view needs its packages: pip install 'picolm[view]'") from error
    return uvicorn


def _has_screen() -> bool:
    """Return whether a browser would have a window, and not take over the terminal."""
    screens = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in screens)


def require_loopback(host: str, remote: bool) -> None:
    """Raise PicoError for an address that other machines reach, unless that was asked for."""
    if remote or host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise PicoError(
        f"--host {host}: other machines could reach the page there, and who knows its address could read the runs. {OPEN} Add "
        "--allow-remote if that is meant, or forward the port with ssh, with the same number on both sides."
    )


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Raises PicoError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)  # whoever opens the address from now on waits until the server answers
        return bound
    except (OSError, OverflowError) as error:
        raise PicoError(
            f"{host}, port {port}: cannot be used ({error}); choose another with --port, or leave it out"
        ) from error


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
