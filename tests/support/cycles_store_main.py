"""A store that reports which of its ended conversations only the garbage collector would free.

On SIGUSR1 it collects, and writes the numbers of unreachable objects by class to the file that the environment variable
``WOOLY_TEST_CYCLES`` names. Collections that happen by themselves are off, so that nothing is lost before.
"""

import collections
import gc
import json
import os
import signal
import sys
from pathlib import Path

gc.disable()
gc.enable = lambda: None
stock_collect = gc.collect
gc.collect = lambda *_: 0  # the store's policy collects, too
gc.freeze = lambda: None


def report(*_):
    gc.set_debug(gc.DEBUG_SAVEALL)
    stock_collect()
    gc.set_debug(0)
    found = collections.Counter(type(one).__qualname__ for one in gc.garbage)
    gc.garbage.clear()
    target = Path(os.environ["WOOLY_TEST_CYCLES"])
    target.with_suffix(".new").write_text(json.dumps(found))
    target.with_suffix(".new").replace(target)


signal.signal(signal.SIGUSR1, report)

from shared_store.daemon.__main__ import main  # noqa: E402 - collections are off before anything is made

sys.exit(main())
