"""Who uses a GPU, as the text of an error tells it."""

from shared_store.memory.cuda.nvidia_smi import describe


def test_users_are_named_with_what_they_hold():
    text = describe("1234, 70120\n88, 310")
    assert text == "the rest is used by pid 1234 (70120 MiB), pid 88 (310 MiB)"


def test_an_amount_that_is_not_told_is_not_made_up():
    assert describe("1234, [N/A]") == "the rest is used by pid 1234 (amount unknown)"


def test_no_list_is_said_to_be_none():
    """In a container nvidia-smi often lists nobody: that is no proof that nobody is there."""
    assert "names no process" in describe("")
    assert "on the host" in describe("")
