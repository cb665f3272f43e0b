"""Activity pages and a restart of the store."""

from __future__ import annotations

from support.waiting import wait_until

from shared_store.activity.writer import ActivityWriter


def test_a_client_gets_another_page_from_a_restarted_store(kept):
    """Also if it has nothing but the page; what it wrote last is shown at once."""
    client, writer = kept.client("engine"), ActivityWriter()
    client.session.report_activity(writer)
    writer.end(4, 2)
    old = kept.kill_store()

    def shown():
        status = kept.status()
        assert status.store.pid != old
        return [row.activity for row in status.clients if row.name == "engine" and row.activity is not None]

    (found,) = wait_until(shown, "the restarted store to show the activity")
    assert (found.busy, found.running, found.waiting) == (True, 4, 2)
    writer.end(0, 0)
    assert [one.busy for one in shown()] == [False]
