"""python -m benchmarks run|row|table|list: see runner.py."""

from __future__ import annotations

import argparse
import sys

from benchmarks import main_table, quantization, runner, structure, table
from benchmarks.runner import Table

TABLES: dict[str, Table] = {
    "main": main_table.TABLE,
    "quantization": quantization.TABLE,
    "structure": structure.TABLE,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the rows that have no result yet, and write the table")
    run.add_argument("--rows", default="", help="only these, separated by commas; patterns such as mpnet-* too")
    run.add_argument("--again", action="store_true", help="run rows anew that have a result")
    row = verbs.add_parser("row", help="run one row in this process (what `run` starts)")
    show = verbs.add_parser("table", help="write the results as Markdown")
    for verb in (run, row, show):
        verb.add_argument("table", choices=sorted(TABLES))
    row.add_argument("row")
    for verb in (run, row):
        verb.add_argument("--seed", type=int, default=0)
    for verb in (run, row, show):
        verb.add_argument(
            "--trial", action="store_true", help="small sizes, to see that it runs; kept apart from the results"
        )
    verbs.add_parser("list", help="tables and rows with their cost")
    given = parser.parse_args(arguments)
    if getattr(given, "trial", False):
        runner.on_trial()
    if given.verb == "run":
        only = [name for name in given.rows.split(",") if name]
        failed = runner.run_table(TABLES[given.table], only, given.again, given.seed)
        write(TABLES[given.table])  # with the reasons of those that failed
        return min(1, failed)
    if given.verb == "row":
        return 0 if runner.run_row(TABLES[given.table], given.row, given.seed) else 1
    if given.verb == "table":
        print(write(TABLES[given.table]))
    else:
        for found in TABLES.values():
            at_once = sum(entry.minutes for entry in found.rows if not entry.on_request)
            every = sum(entry.minutes for entry in found.rows)
            print(
                f"{found.name}: {found.title}; {at_once:.0f} min on 2 cores, {every:.0f} with the rows on request (*)"
            )
            for entry in found.rows:
                mark = "*" if entry.on_request else " "
                print(f"  {entry.minutes:5.1f} min {mark} {entry.name}: {entry.summary}")
    return 0


def write(found: Table) -> str:
    """The page of a table, as it was written beside its rows."""
    path = runner.RESULTS / f"{found.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (found.page or table.markdown)(found)
    path.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    sys.exit(main())
