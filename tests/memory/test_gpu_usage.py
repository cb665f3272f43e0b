"""The processes that use a GPU, in the text of an error."""

from shared_store.memory.cuda.nvidia_smi import describe


def test_processes_are_named_with_their_memory():
    text = describe("1234, 70120\n88, 310")
    assert text == "the rest is used by pid 1234 (70120 MiB), pid 88 (310 MiB)"


def test_an_unknown_amount_is_not_invented():
    assert describe("1234, [N/A]") == "the rest is used by pid 1234 (amount unknown)"


def test_an_empty_list_is_explained():
    """In a container nvidia-smi often lists no process, although other processes use the GPU."""
    assert "names no process" in describe("")
    assert "on the host" in describe("")
