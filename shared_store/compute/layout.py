"""Layout of a compute page, version 1: what a workload says of its steps, and what the arbiter lets it do.

Little-endian words of 8 bytes, at fixed offsets. A word has one writer, and is written by one aligned store of 8 bytes,
which is atomic on the supported machines. A reader may see a new word beside an older one: each is meaningful alone.
Times are ``CLOCK_MONOTONIC`` in nanoseconds.

======  ==============  ===========================================================================================
index   word            content
======  ==============  ===========================================================================================
0       version         1; written when the page is made
1       state           the workload's: bit 63: it has work; bits 0 to 31: batches in flight
2       begun           the workload's: steps begun so far
3       ended           the workload's: steps ended so far
4       busy            the workload's: nanoseconds with a batch in flight, up to the last change
5       busy since      the workload's: time since which a batch is in flight; 0: none is
6       held            the workload's: nanoseconds for which it had to wait, up to the end of the last wait
7       held since      the workload's: time since which it waits to begin a step; 0: it does not
16      until           the arbiter's: time before which steps may begin; :data:`FREE`: always; 0: it is held
17      allowed         the arbiter's: a step may begin in any case while fewer than so many have begun
18      contended       the arbiter's: 1: others share a device, so changes of the workload's state ring
19      short until     the arbiter's: time before which steps should be short; :data:`FREE`: from now on; 0: no need
20      looked          the arbiter's: time at which it last read the page; 0: never
======  ==============  ===========================================================================================
"""

from __future__ import annotations

from typing import Final

VERSION: Final = 1
SIZE: Final = 4096

VERSION_WORD: Final = 0
STATE_WORD, BEGUN_WORD, ENDED_WORD, BUSY_WORD, BUSY_SINCE_WORD, HELD_WORD, HELD_SINCE_WORD = range(1, 8)
UNTIL_WORD, ALLOWED_WORD, CONTENDED_WORD, SHORT_UNTIL_WORD, LOOKED_WORD = range(16, 21)

WORKING: Final = 1 << 63
IN_FLIGHT: Final = (1 << 32) - 1
FREE: Final = (1 << 64) - 1

LOOK_S: Final = 0.4
"""Longest time between two looks of an arbiter at a page, in seconds: short enough to notice a lack of progress."""

SILENT_S: Final = 5.0
"""Time without a look after which a held workload counts its arbiter as gone: stopped, or stuck."""
