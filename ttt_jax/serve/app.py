"""The web application: the websocket, the page, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ttt_jax.errors import InputError
from ttt_jax.serve import metrics, session
from ttt_jax.serve.access import Access
from ttt_jax.serve.opus import check_rate
from ttt_jax.serve.protocol import PATH, Request, parse_query
from ttt_jax.serve.service import Service
from ttt_jax.serve.talks import Talks
from ttt_jax.serve.ticks import Seat

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger("ttt_jax")

PAGE = Path(__file__).parent / "page"
SEND_BUFFER = 1 << 16


def make_app(service: Service, access: Access, page: Path = PAGE) -> web.Application:
    """Returns the application; `service.ticks.run` must run beside it."""
    from aiohttp import web

    talking: set[asyncio.Task] = set()
    noticed: set[str] = set()

    @web.middleware
    async def checked(request: web.Request, handler):
        if not access.is_host(request.headers):
            raise web.HTTPForbidden(
                text=f"This server has another name than {request.host[:100]!r}: ask for localhost."
            )
        if request.path in (PATH, "/metrics") and not access.has_token(request.headers, request.query):
            raise web.HTTPUnauthorized(
                text="The token is missing or wrong: add token=T, as in the URL that the server prints."
            )
        response = await handler(request)
        if not response.prepared:
            response.headers.update({"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})
        return response

    async def chat(request: web.Request) -> web.StreamResponse:
        if not access.is_origin(request.headers):
            raise web.HTTPForbidden(text="Pages of this origin may not talk: start the server with --origin for them.")
        try:
            asked = parse_query(request.query)
            if asked.coding == "opus":
                check_rate(service.speech.codec.sample_rate)
        except InputError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        # aiohttp cuts off what is much too large; what is too large is told so by the session.
        # Pings of the websocket come to the session, too: aiohttp would answer a flood of them without a rest.
        ws = web.WebSocketResponse(autoping=False, max_msg_size=2 * service.limits.max_message, compress=False)
        if not ws.can_prepare(request):
            raise web.HTTPBadRequest(text="This is the address of a websocket: open / in a browser.")
        seat, seed = await _seat(asked, service)
        try:
            await ws.prepare(request)
            _bound_buffer(request)
        except BaseException:
            service.ticks.give_back(seat)
            raise
        for name in set(asked.ignored) - noticed:
            log.warning(f"clients give {name}, which has no effect here.")
        noticed.update(asked.ignored)
        task = asyncio.current_task()
        talking.add(task)
        try:
            await session.serve(ws, lambda: request.transport and request.transport.abort(), asked, seed, seat, service)
        finally:
            talking.discard(task)
        return ws

    async def show_metrics(_: web.Request) -> web.Response:
        text = service.metrics.text(service.ticks.taken, service.ticks.rows)
        return web.Response(body=text.encode(), headers={"Content-Type": metrics.TYPE})

    async def healthy(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def index(_: web.Request) -> web.StreamResponse:
        return web.FileResponse(page / "index.html")

    async def stop(_: web.Application) -> None:
        service.stops.set()
        if talking:
            await asyncio.wait(talking, timeout=2 * session.CLOSING_SECONDS)

    app = web.Application(middlewares=[checked], client_max_size=service.limits.max_message)
    app.on_shutdown.append(stop)
    app.router.add_get(PATH, chat)
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthy)
    app.router.add_get("/", index)
    app.router.add_static("/static/", page)
    app.router.add_static("/", page)
    return app


def _bound_buffer(request: web.Request) -> None:
    """Keeps what the system holds for a client that does not read small: megabytes are minutes of speech."""
    if request.transport is not None:
        with contextlib.suppress(OSError):  # the client is gone already
            request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


async def _seat(asked: Request, service: Service) -> tuple[Seat, int]:
    """The seat of the talk that a client asks for, which has joined, and its seed."""
    from aiohttp import web

    if asked.fork is not None:
        taken = service.take_fork(asked.fork)
        if taken is None:
            raise web.HTTPNotFound(text="No talk waits under this key: keys are used once, and expire after a minute.")
        return taken
    seat = service.ticks.seat()
    if seat is None:
        service.metrics.refused += 1
        raise web.HTTPServiceUnavailable(text=f"All {service.ticks.rows} talks are taken: try again later.")

    def join(talks: Talks) -> None:
        seat.row = talks.join(asked.settings, asked.seed, asked.first_frame)

    try:
        await service.ticks.call(join)
    except BaseException as error:
        service.ticks.give_back(seat)
        if isinstance(error, InputError):
            raise web.HTTPBadRequest(text=str(error)) from None
        raise
    service.metrics.begun += 1
    return seat, asked.seed
