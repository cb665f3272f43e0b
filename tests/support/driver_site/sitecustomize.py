"""Have this process find the tests' driver where it would call the one of a GPU."""

import os

if "WOOLY_TEST_DRIVER" in os.environ:
    from support.file_driver import FileDriver

    import shared_store.memory.cuda.checkpoint
    import shared_store.overcommit.checkpoints.processes

    shared_store.memory.cuda.checkpoint.Checkpoints = FileDriver
    shared_store.overcommit.checkpoints.processes.DEVICE = os.environ["WOOLY_TEST_DRIVER"] + "/device"
