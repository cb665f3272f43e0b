"""Groups of users, named or numbered in options.

A name is looked up in the user database, which may be slow (LDAP, SSSD): at start-up only, never for each client.
"""

from __future__ import annotations

from shared_store.base.errors import ConfigError


def gid_of(group: str) -> int:
    """Return the id of a group. A number is taken as it is: a group in a container need not have a name.

    Raises:
        ConfigError: there is no group of this name.
    """
    if group.isascii() and group.isdigit():
        return int(group)
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise ConfigError(
            f"there is no group {group!r}; `getent group` lists all groups, and a number needs no name"
        ) from error
