"""The live server: loads a checkpoint, compiles its steps, listens, and closes cleanly."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttt_jax.errors import InputError
from ttt_jax.moshi.generate import Sampling
from ttt_jax.serve import load
from ttt_jax.serve.access import Access, access
from ttt_jax.serve.app import PAGE, make_app
from ttt_jax.serve.memories import Memories
from ttt_jax.serve.metrics import Metrics
from ttt_jax.serve.service import Limits, Service
from ttt_jax.serve.session import CLOSING_SECONDS
from ttt_jax.serve.talks import Talks
from ttt_jax.serve.ticks import Ticks
from ttt_jax.utils.command import INTERRUPTED, keep_compiled
from ttt_jax.utils.files import run_and_step

if TYPE_CHECKING:
    from aiohttp import web

    from ttt_jax.serve.__main__ import Options


MOST = Sampling(top_k=500, text_top_k=500)
"""Largest top-k that a client may ask for."""


def serve(options: Options) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit code. Raises `InputError` for what cannot be."""
    import aiohttp  # noqa: F401  before minutes of loading
    import sphn  # noqa: F401

    page = options.static or PAGE
    if not (page / "index.html").is_file():
        raise InputError(f"{page} has no index.html: give the folder of a page.")
    tls = _tls(options)
    with _bound(options.host, options.port) as listener:
        loaded = load.load(options.checkpoint, options.codec, MOST)
        keep_compiled(loaded.checkpoint.cache_dir / "compiled")
        rules = access(options.host, options.token, options.origin)
        return asyncio.run(_serve(options, loaded, rules, page, listener, tls))


async def _serve(
    options: Options,
    loaded: load.Loaded,
    rules: Access,
    page: Path,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
) -> int:
    service = make_service(options, loaded)
    print(f"{loaded.checkpoint.name} is loaded; compiling the steps of {options.rows} talks ...", flush=True)
    await service.ticks.call(warm_up)
    app = make_app(service, rules, page)
    port = listener.getsockname()[1]
    query = f"/?token={rules.token}" if rules.token else "/"
    name = f"[{options.host}]" if ":" in options.host else options.host
    url = f"{'http' if tls is None else 'https'}://{name}:{port}{query}"
    return await _until_signal(app, service, listener, tls, f"{loaded.checkpoint.name} talks at {url}")


def make_service(options: Options, loaded: load.Loaded) -> Service:
    """What the clients share."""
    talks = Talks(loaded.speech, options.rows, measured=bool(loaded.speech.cfg.ttt_layers))
    metrics = Metrics()
    path = Path(loaded.checkpoint.about["path"])
    run, _ = run_and_step(path) or (path, None)
    folder = options.memories or run / "memories"
    memories = Memories(folder, options.max_memories, loaded.speech, loaded.checkpoint.about["weights"])
    return Service(
        loaded.checkpoint.name,
        loaded.speech,
        loaded.tokenizer,
        Ticks(talks, metrics),
        metrics,
        memories,
        Limits(options.queue, options.max_message, options.idle),
        options.every,
    )


def warm_up(talks: Talks) -> None:
    """Compiles everything that a talk uses, so that no client waits for it."""
    row = talks.join()
    for _ in range(2):
        talks.step({row: np.zeros(talks.speech.codec.frame_size, np.float32)})
    talk = talks.take(row)
    if talks.free:
        talks.leave(talks.join(talk=talk))  # a fork
    talks.put_memory(row, None)
    talks.leave(row)


async def _until_signal(
    app: web.Application, service: Service, listener: socket.socket, tls: ssl.SSLContext | None, says: str
) -> int:
    from aiohttp import web

    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    codes: list[int] = []

    def stop(code: int) -> None:
        codes.append(code)
        stopped.set()

    loop.add_signal_handler(signal.SIGINT, stop, INTERRUPTED)
    loop.add_signal_handler(signal.SIGTERM, stop, 0)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=CLOSING_SECONDS)
    await runner.setup()
    await web.SockSite(runner, listener, ssl_context=tls).start()
    print(says, flush=True)
    steps, stop_waits = asyncio.create_task(service.ticks.run()), asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait([steps, stop_waits], return_when=asyncio.FIRST_COMPLETED)
        if steps.done():
            steps.result()  # raises
    finally:
        await runner.cleanup()
        steps.cancel()
        await asyncio.wait([steps])
        service.ticks.close()
    return codes[0]


def _bound(host: str, port: int) -> socket.socket:
    """A socket that is bound, but does not listen. Raises `InputError` if it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host} is no address of this machine ({error.strerror}): give another.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is taken: give another one by --port.") from None
        raise InputError(f"port {port} of {host} cannot be had ({error.strerror}): give others.") from None
    return listener


def _tls(options: Options) -> ssl.SSLContext | None:
    if options.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except OSError as error:  # ssl.SSLError is one
        raise InputError(
            f"{options.tls_cert} and {options.tls_key} are no certificate and key ({error.strerror}): give PEM files."
        ) from None
    return context
