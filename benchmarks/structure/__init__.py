"""The table of structure: pruning and distillation on two real encoders, beside their controls and the reference."""

from __future__ import annotations

from benchmarks import sanity
from benchmarks.models import MINILM, MPNET
from benchmarks.runner import Table
from benchmarks.structure import large, page, rows, zeros
from benchmarks.structure.asks import row_name

ABOUT = f"""Models: {MPNET.title} (109.5M weights, one seed) and {MINILM.title} (22.7M, three seeds), fine-tuned on Rotten
Tomatoes (Pang and Lee 2005; deduplicated, split by the hash of the text into four fifths and one) as in the table of
quantization. Every row is one command of `flyweight` in a fresh process. Accuracy: in onnxruntime, on the held-out fifth, text
by text; differences are paired, example by example, averaged over the seeds, with a bootstrap 95 % interval over the examples.
"Minus its control": the same student, start, steps and rate on the labels alone. Speed: the exported result against the
reference's fp32 file in onnxruntime, one thread, random token ids, in turn within 60 rounds; median of the ratios within a
round with its 95 % interval. Seconds and peak memory: of the whole command (in brackets the step alone, and what `--dry-run`
expected of it), the table of block times that a wish needs included. Nothing was chosen on the held-out fifth."""

ROWS = (*rows.rows(), zeros.ROW, *large.ROWS, *sanity.ROWS)
TABLE = Table(
    "structure", "Structured pruning and distillation", ABOUT, ROWS, row_name(MINILM, "fp32", 0), page.markdown
)
