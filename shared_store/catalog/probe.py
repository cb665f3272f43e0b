"""Asking a catalog server whether it is there, for checks of an installation."""

from __future__ import annotations


def server_version(url: str, *, timeout_s: float = 2.0) -> str:
    """The version of the Redis or Valkey server at a URL.

    Raises:
        OSError: it does not answer, or the URL is not one.
    """
    import redis

    try:
        with redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s) as client:
            return str(client.info("server").get("redis_version", "of unknown version"))
    except (redis.RedisError, ValueError) as error:
        raise OSError(str(error)) from error
