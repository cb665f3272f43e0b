"""Validate the URL of a Redis or Valkey server, and remove its credentials for display."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from shared_store.base.errors import ConfigError

_SCHEMES: Final = ("redis", "rediss", "unix")


def without_credentials(url: str) -> str:
    """Return the URL without user name and password.

    Raises:
        ConfigError: it is not the URL of a Redis server.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is not a number
    except ValueError as error:
        raise ConfigError(f"the catalog's URL is invalid: {error}; use redis://HOST:PORT/DB") from error
    if parts.scheme not in _SCHEMES:
        raise ConfigError(
            f"the catalog's URL has the scheme {parts.scheme!r}; use redis://HOST:PORT/DB, rediss://... or unix:///PATH"
        )
    query = [(name, value) for name, value in parse_qsl(parts.query) if name not in {"username", "password"}]
    shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)).geturl()
    # geturl() drops the slashes of an empty authority for schemes that it does not know.
    return shown if shown.startswith(f"{parts.scheme}://") else shown.replace(":", "://", 1)
