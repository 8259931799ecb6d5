"""The report of a finished run, or of several side by side: `python -m pdprune.report RUN [RUN ...]`.

One run gets `report.html` into its folder; several get one page, `comparison.html` in the current folder. With `--out`
the page goes elsewhere. Target and prompts are read again from the run's `config.yaml`, so that relative paths in it
must hold from where the command is given.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pdprune.errors import UserError
from pdprune.progress import telling
from pdprune.report import AuditedRun, write_comparison, write_report
from pdprune.run_folder import REPORT_FILE


def main(args: list[str] | None = None) -> int:
    """Write the page and return the exit status: 2 for a mistake of the user's, told in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m pdprune.report", description="Show a finished run, or several side by side, as one HTML page."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the folder of a finished fit")
    parser.add_argument("--out", type=Path, help="the file to write")
    given = parser.parse_args(args)
    try:
        runs = [AuditedRun.load(folder) for folder in given.runs]
        with telling("report") as tell:
            if len(runs) == 1:
                path = given.out or runs[0].folder / REPORT_FILE
                write_report(runs[0], path, tell)
            else:
                path = given.out or Path("comparison.html")
                write_comparison(runs, path, tell)
    except UserError as error:
        print("pdprune: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
