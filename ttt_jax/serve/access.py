"""Who may talk: hosts, origins and the token."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """What a request must have."""

    loopback: bool
    """The server is bound to a loopback address: the Host header must name one, so that a foreign name which a page
    lets point to this machine (DNS rebinding) is refused."""
    token: str | None
    """None: none is needed."""
    origins: tuple[str, ...] = ()
    """Origins of pages besides the server's own that may talk, as https://example.org."""

    def is_host(self, headers: Mapping[str, str]) -> bool:
        """Whether the request was meant for this server."""
        return not self.loopback or is_loopback(_host_of(f"//{headers.get('Host', '')}"))

    def is_origin(self, headers: Mapping[str, str]) -> bool:
        """Whether a page may talk; programs send no Origin and may."""
        origin, host = headers.get("Origin"), headers.get("Host", "")
        if origin is None or origin in self.origins:
            return True
        return host != "" and origin.partition("://")[2].lower() == host.lower()

    def has_token(self, headers: Mapping[str, str], query: Mapping[str, str]) -> bool:
        """Whether the token is in the URL (token=T) or in the header (Authorization: Bearer T)."""
        if self.token is None:
            return True
        given = query.get("token") or headers.get("Authorization", "").removeprefix("Bearer ")
        return secrets.compare_digest(given.encode(errors="replace"), self.token.encode())


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def access(host: str, token: str | None, origins: Sequence[str]) -> Access:
    """The rules of a server bound to `host`: off loopback it always has a token."""
    loopback = is_loopback(host)
    if token is None and not loopback:
        token = secrets.token_urlsafe(24)
    return Access(loopback, token, tuple(origins))
