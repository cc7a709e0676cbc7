"""python -m benchmarks run|table|list: see runner.py."""

from __future__ import annotations

import argparse
import sys

from benchmarks import main_table, runner, table
from benchmarks.runner import Table

TABLES: dict[str, Table] = {"main": main_table.TABLE}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the rows that have no result yet")
    run.add_argument("--rows", default="", help="only these, separated by commas")
    run.add_argument("--again", action="store_true", help="run rows anew that have a result")
    row = verbs.add_parser("row", help="run one row in this process (what `run` starts)")
    show = verbs.add_parser("table", help="write the results as Markdown")
    for verb in (run, row, show):
        verb.add_argument("table", choices=sorted(TABLES))
    row.add_argument("row")
    for verb in (run, row):
        verb.add_argument("--seed", type=int, default=0)
    verbs.add_parser("list", help="tables and rows with their cost")
    given = parser.parse_args(arguments)
    if given.verb == "run":
        only = [name for name in given.rows.split(",") if name]
        return min(1, runner.run_table(TABLES[given.table], only, given.again, given.seed))
    if given.verb == "row":
        runner.run_row(TABLES[given.table], given.row, given.seed)
    elif given.verb == "table":
        path = runner.RESULTS / f"{given.table}.md"
        text = table.markdown(TABLES[given.table])
        path.write_text(text, encoding="utf-8")
        print(text)
    else:
        for found in TABLES.values():
            print(f"{found.name}: {found.title}")
            for entry in found.rows:
                print(f"  {entry.minutes:5.1f} min  {entry.name}: {entry.summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
