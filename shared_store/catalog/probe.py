"""Probe a catalog server, for ``wooly doctor``."""

from __future__ import annotations


def server_version(url: str, *, timeout_s: float = 2.0) -> str:
    """Return the version of the Redis or Valkey server at a URL.

    Raises:
        OSError: the server does not answer, or the URL is invalid.
    """
    import redis

    try:
        with redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s) as client:
            return str(client.info("server").get("redis_version", "of unknown version"))
    except (redis.RedisError, ValueError) as error:
        raise OSError(str(error)) from error
