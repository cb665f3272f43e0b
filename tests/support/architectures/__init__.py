"""Small random models of many transformers architectures: config, inputs, and checkpoints on disk.

Each has a few MiB, with tensors on both sides of 16 KiB (small ones are copied into a process, large ones are mapped),
and weights of a spread that makes every one of them show in the outputs. Relies on transformers 5.16 or newer having
the classes that are named. Checkpoints are equal from run to run under the same versions of torch and transformers.
"""

from __future__ import annotations

from support.architectures.architecture import Architecture
from support.architectures.decoders import DECODERS
from support.architectures.encoders import ENCODERS
from support.architectures.modalities import MODALITIES
from support.architectures.sparse import SPARSE

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: tuple[Architecture, ...] = (*DECODERS, *SPARSE, *ENCODERS, *MODALITIES)
