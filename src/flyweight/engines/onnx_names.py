"""How values are named in our ONNX files where somebody looks for them later."""

from __future__ import annotations

__all__ = ["FLAT", "LOOKUP", "OUTLIERS", "UNPACKED", "UPPER"]

FLAT = ".flat"
"""At the end: a value made a matrix (`engines.onnx_rows`)."""
LOOKUP = ".rows"
"""At the end: a table's rows as they lie in the file."""
UPPER = ".upper"
"""At the end: the upper bits of such bytes, by a QuantizeLinear that rounds no activation."""
UNPACKED = ".unpacked"
"""At the end: the integers of rows whose bytes hold more than one."""
OUTLIERS = ".outliers."
"""Inside: the channels that a product takes in float."""
