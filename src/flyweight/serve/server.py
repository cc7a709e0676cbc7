"""Run the app: one process, graceful stop, a clear word when the port cannot be had."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flyweight.errors import EngineError, SettingsError
from flyweight.runtime import open_model
from flyweight.serve.app import Limits, Service, create_app

__all__ = ["serve"]

DRAIN = 30.0  # seconds that a stop waits for requests in progress


def serve(
    path: Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    threads: int = 1,
    limits: Limits | None = None,
    engine: str = "onnxruntime",
) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish those in progress.

    Raises SettingsError (port), ArtifactError, EngineError.
    """
    check_address(host, port)
    service = Service(open_model(path, engine, threads), Path(path).resolve().name, limits or Limits())
    try:
        asyncio.run(_run(create_app(service), host, port))
    finally:
        service.close()


def check_address(host: str, port: int) -> None:
    """Raises SettingsError when nothing can listen there. The server itself would share a taken port silently."""
    if not 1 <= port <= 65535:
        raise SettingsError("a --port from 1 to 65535", str(port), "name the port that clients will use")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            if sys.platform != "win32":  # there it would allow to take over a port in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{host}:{port} to be free", f"'{reason}'", "choose another --port or --host") from None


async def _run(app: Any, host: str, port: int) -> None:
    from granian.constants import Interfaces
    from granian.server.embed import Server

    server = Server(app, host, port, interface=Interfaces.ASGINL, log_enabled=False, websockets=False)
    stopping = asyncio.Event()

    def stop() -> None:
        stopping.set()
        server.stop()  # type: ignore[no-untyped-call]

    with _on_signals(stop):
        running = asyncio.create_task(server.serve())
        ready = asyncio.create_task(_say_ready(host, port))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait({running, stopped}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if stopping.is_set():
            await asyncio.wait({running}, timeout=DRAIN)
        else:
            stopped.cancel()
            raise EngineError("the server to run until it is stopped", "an early end", "see the lines above") from (
                running.exception()
            )


@contextlib.contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` in the loop on SIGTERM and SIGINT; works where loops take no signal handlers (Windows), too."""
    loop = asyncio.get_running_loop()
    before = {
        number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _say_ready(host: str, port: int) -> None:
    """One line on stderr once connections are taken."""
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    while True:
        try:
            _, writer = await asyncio.open_connection(near, port)
            break
        except OSError:
            await asyncio.sleep(0.02)
    writer.close()
    shown = f"[{host}]" if ":" in host else host
    print(f"ready: http://{shown}:{port} (stop with Ctrl-C)", file=sys.stderr, flush=True)
    if not _loopback(host):
        print("warning: no key is asked for; anyone who reaches this address can use it", file=sys.stderr, flush=True)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
