"""The rows of the parity matrix cover all random models and file formats."""

from __future__ import annotations

from support.models import families, quantized

from benchmarks.parity.rows import ROWS


def test_every_family_and_every_format_has_rows() -> None:
    """Fails if a random model or a format has no row. GPU rows use graphs unless they also exist without."""
    rows = ROWS.values()
    assert {row.model for row in rows if row.gpu} == {row.model for row in rows if row.cpu} == set(families.FAMILIES)
    assert set(quantized.METHODS) < {row.quantization for row in rows}
    assert {row.dtype for row in rows if row.model == "llama" and row.graphs} == {"bfloat16", "float16", "float32"}
    assert all(row.graphs or row.cpu for row in rows)
