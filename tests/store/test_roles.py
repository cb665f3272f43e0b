"""Administration is for administrators: real processes of other users, through the command and the protocol."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from support.content import key
from support.users import NOBODY, needs_root, wooly_as
from support.waiting import wait_until

from shared_store.base.errors import ModelNotFoundError, PermissionDeniedError
from shared_store.protocol import messages
from shared_store.runtime.options import ServeOptions
from shared_store.store.roles import ADMIN_REQUESTS, Roles
from shared_store.store.state.clients import Client

MIB = 1 << 20
ADMIN = 4242
GROUP = 54321

COMMANDS = {
    "rm": (["rm", key(1)], "remove models"),
    "pin": (["pin", key(1)], "pin or unpin models"),
    "unpin": (["unpin", key(1)], "pin or unpin models"),
    "compact": (["compact", "--device", "cpu"], "compact memory"),
    "upgrade": (["upgrade"], "replace the store by another version"),
    "stop": (["stop"], "stop the store"),
}


@pytest.fixture
def published(start_store):
    """Start a store with options, and publish a model in it. Returns the store."""

    def start(**options):
        store = start_store(**options)
        client = store.client()
        client.publish(key(1), [[1, MIB]])
        client.unmap_all()
        client.leave(key(1))
        return store

    return start


@needs_root
def test_a_user_who_may_attach_is_no_administrator(published):
    """Each command ends with exit code 6 and says who may; nothing changes; the store counts and logs it."""
    store = published(allow_uids=[NOBODY])
    for command, (arguments, action) in COMMANDS.items():
        done = wooly_as(*arguments, uid=NOBODY)
        assert done.returncode == 6, (command, done)
        assert f"uid {NOBODY} may not {action}: only uid 0 may" in done.stderr
        assert f"`wooly serve --admin-uid {NOBODY}`" in done.stderr
        assert f"uid {NOBODY} may not {action}" in store.log()
    status = store.client().session.status()
    assert status.counters.permission_denials == len(COMMANDS)
    assert [(model.key, model.pinned) for model in status.models] == [(key(1), False)]


@needs_root
def test_a_denied_request_is_an_event(published):
    store = published(allow_uids=[NOBODY])
    assert wooly_as("pin", key(1), uid=NOBODY).returncode == 6

    def events():
        done = wooly_as("events", "--json", "--kind", "permission_denied", uid=0)
        return [json.loads(line) for line in done.stdout.splitlines()]

    wait_until(events, "the event to reach the catalog")
    (event,) = events()
    assert (event["fields"]["request"], event["fields"]["uid"]) == ("pin", NOBODY)
    assert store.client().alive()


@needs_root
def test_reading_needs_no_administrator(published):
    """Status, models and verification stay open to everybody who may connect."""
    published(allow_uids=[NOBODY])
    for command in ("status", "models"):
        done = wooly_as(command, uid=NOBODY)
        assert done.returncode == 0, done.stderr


@needs_root
@pytest.mark.parametrize("appointed", ["uid", "group", "environment"])
def test_an_appointed_administrator_may_connect_and_administer(published, monkeypatch, appointed):
    """By `--admin-uid`, by a supplementary group of `--admin-group`, which has no name here, or by the environment."""
    options = {"uid": {"admin_uids": [ADMIN]}, "group": {"admin_group": str(GROUP)}, "environment": {}}[appointed]
    user = {"uid": ADMIN, "gid": NOBODY, "groups": [GROUP] if appointed == "group" else []}
    if appointed == "environment":
        monkeypatch.setenv("WOOLY_ADMIN_UIDS", f"1, {ADMIN}")
        options = {"admin_uids": list(ServeOptions.from_environment().admin_uids)}
    store = published(**options)
    for command in ("pin", "unpin", "rm", "stop"):
        done = wooly_as(*COMMANDS[command][0], **user)
        assert done.returncode == 0, (command, done.stderr)
    assert store.wait() == 0


@needs_root
def test_another_member_of_the_client_group_is_no_administrator(published):
    store = published(socket_group=str(GROUP), admin_uids=[ADMIN])
    denied = wooly_as("rm", key(1), uid=NOBODY, groups=[GROUP])
    assert denied.returncode == 6
    assert f"only uids 0, {ADMIN} may" in denied.stderr
    assert store.client().session.status().models


def test_root_and_the_stores_own_user_always_are_administrators():
    roles = Roles(frozenset({ADMIN}), GROUP, own_uid=1000)
    may = [uid for uid in (0, 1, 1000, 1001, ADMIN) if roles.is_admin(uid, frozenset())]
    assert may == [0, 1000, ADMIN]
    assert roles.is_admin(7, frozenset({3, GROUP}))
    with pytest.raises(PermissionDeniedError, match=f"only uids 0, 1000, {ADMIN} and members of group {GROUP} may"):
        roles.require_admin(Client(1, 1, 7, ""), "do this")


def test_every_request_of_an_administrator_is_checked_before_its_handler():
    """The table names what changes the store for everybody. A request that is added to the protocol is decided here."""
    open_to_all = {
        *(messages.Open, messages.Plan, messages.Fill, messages.Commit, messages.Abandon, messages.Leave),
        *(messages.Rejoin, messages.Offer, messages.Report, messages.ReportFallback, messages.Quarantine),
        *(messages.Acquire, messages.Yield, messages.RecallFiles, messages.RememberFiles),
        *(messages.GetStatus, messages.GetActivityPage),
        *(messages.CopyToHost, messages.FillHostCopy, messages.AddHostCopies),  # the sleep of a reader
        *(messages.GoAway, messages.ReleaseHostCopies),
        *(messages.Join, messages.TakeRoom, messages.ReportWorkload, messages.ExplainWorkload, messages.JoinCompute),
        messages.OfferCheckpoints,  # of a workload of the client's own user
        *(
            messages.MoveWorkload,
            messages.SetPriority,
            messages.SetShare,
        ),  # their handler admits the workload's own user, too
        *(messages.Compacted, messages.AbandonCompaction),  # of a compaction that the client may begin
    }
    requests = {cls for cls in get_args(messages.ClientMessage) if issubclass(cls, messages.Request)}
    assert requests - open_to_all == set(ADMIN_REQUESTS)
    assert open_to_all <= requests - set(ADMIN_REQUESTS)


def test_the_handler_is_not_reached(store):
    """An administrator's request for a model that does not exist is answered by its handler."""
    with pytest.raises(ModelNotFoundError):
        store.client().session.remove(key(9))
