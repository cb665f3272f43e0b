"""After any sequence of operations and faults, the catalog equals the last snapshot."""

import pytest
from catalog.documents import blob, events, expected, lease, model, node, read, snapshot
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from shared_store.catalog import Catalog

KEYS = st.sampled_from(["aa", "bb", "cc", "dd"])
MODELS = st.builds(
    model,
    KEYS,
    st.lists(st.integers(0, 12), unique=True, max_size=8).map(lambda numbers: [blob(n) for n in numbers]),
    state=st.sampled_from(["publishing", "committed"]),
    manifest=st.binary(max_size=20),
)
SNAPSHOTS = st.builds(
    snapshot,
    st.lists(MODELS, max_size=4, unique_by=lambda doc: doc.key),
    st.lists(st.builds(lease, st.integers(1, 5), KEYS), max_size=4, unique_by=lambda doc: doc.client),
)


class AnyOrder(RuleBasedStateMachine):
    """Updates, events, flushes, lost data, lost connections and restarts of the store, against one server."""

    url: str
    connect: object

    def __init__(self):
        super().__init__()
        self.client = self.connect()
        self.client.flushall()
        self.epoch = 0
        self.held = snapshot()
        self.catalog = None
        self.sent = 0

    @initialize(first=SNAPSHOTS)
    def begin(self, first):
        self.run(first)

    def run(self, held):
        self.epoch += 1
        self.of = node(epoch=f"epoch-{self.epoch}", started_at=float(self.epoch))
        self.held = snapshot(held.models, held.leases, of=self.of)
        self.catalog = Catalog(self.url, lease_ttl_s=5)
        self.catalog.start(self.held)
        self.sent = 0

    @rule(held=SNAPSHOTS)
    def update(self, held):
        self.held = snapshot(held.models, held.leases, of=self.of)
        self.catalog.update(self.held)

    @rule()
    def event(self):
        self.sent += 1
        self.catalog.event("sent", number=self.sent)

    @rule()
    def flush(self):
        assert self.catalog.flush(20)
        assert read(self.client) == expected(self.held)

    @rule()
    def lose_all(self):
        self.client.flushall()

    @rule()
    def lose_the_connection(self):
        self.client.client_kill_filter(_type="normal", skipme=True)

    @rule()
    def lose_all_and_the_connection(self):
        self.lose_all()
        self.lose_the_connection()

    @rule(clean=st.booleans())
    def restart_the_store(self, clean):
        if not clean:
            self.lose_the_connection()
        self.catalog.stop()
        self.run(self.held)

    def teardown(self):
        if self.catalog is not None:
            assert self.catalog.flush(20)
            assert read(self.client) == expected(self.held)
            numbers = [
                int(e["number"]) for e in events(self.client) if e["kind"] == "sent" and e["epoch"] == self.of.epoch
            ]
            assert numbers == sorted(set(numbers))
            self.catalog.stop()
            assert set(self.client.keys("*")) <= {b"wooly:events"}
        self.client.close()


@pytest.mark.timeout(240)
def test_any_sequence_ends_with_the_last_snapshot(server):
    AnyOrder.url, AnyOrder.connect = server.url, staticmethod(server.client)
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
