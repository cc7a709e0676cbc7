"""The table of quantization: two real encoders in every format, beside what the engines and other tools make of them."""

from __future__ import annotations

from benchmarks import sanity
from benchmarks.models import CALIBRATION, HELD_OUT, MINILM, MPNET
from benchmarks.quantization import classes, page, vectors
from benchmarks.runner import Table

ABOUT = f"""Models: {MINILM.title} (22.7M weights) and {MPNET.title} (109.5M), both real fp32. Texts: Rotten Tomatoes sentences
(Pang and Lee 2005), deduplicated, split by the hash of the text; {CALIBRATION} of one part calibrate every method and
peer, {HELD_OUT:,} of the other are judged on, one by one. Cosine: of a format's sentence vectors to the same model's in
torch fp32, with bootstrap 95 % intervals. Accuracy: of a model fine-tuned once a seed; differences are paired, example
by example, averaged over the seeds, with a bootstrap 95 % interval over the examples. Times: one thread, random token
ids, all candidates of a model in turn within each round of one run; speeds are medians of the ratios within a round.
MB: the engine's file, tokenizer and manifest. To make: the whole `flyweight quantize` command in a fresh process on 2
cores (in brackets the step alone, and what `--dry-run` expected of it), and the peak memory of its process tree.
OpenVINO computes in fp32 where it has no integers; left to itself it takes bf16 where the CPU can. The last rows of
each accuracy table need no neural network, or hardly one."""

ROWS = (
    *vectors.rows(MINILM),
    *classes.rows(MINILM),
    *sanity.ROWS,
    *vectors.rows(MPNET),
    *classes.rows(MPNET),
)
TABLE = Table("quantization", "Quantization", ABOUT, ROWS, vectors.reference_row(MINILM), page.markdown)
