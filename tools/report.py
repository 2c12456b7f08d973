"""Write the HTML report of a run, or of several runs overlaid: python tools/report.py RUN [RUN2 ...]

RUN is an output directory of sft.py. sft.py writes the report of its own run at every checkpoint.
"""

if __name__ == "__main__":
    import os
    import sys

    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    from settings import venv

    venv.enter()  # where torch is missing, continue in the .venv that train.sh made

import os
import sys
from dataclasses import dataclass

from screen import report
from settings.errors import printable, run
from settings.parser import parse, setting


@dataclass
class Config:
    """Write the report of a run, or of several overlaid: python tools/report.py RUN [RUN2 ...] [flags]"""

    output: str | None = setting(
        None, "file to write; none: RUN/report.html, or ./comparison.html for several runs", group="report")


def main():
    arguments = sys.argv[1:]
    n_runs = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    cfg, _ = parse(Config, arguments[n_runs:])
    runs = arguments[:n_runs] or ["./outputs"]
    default = os.path.join(runs[0], "report.html") if len(runs) == 1 else "comparison.html"
    print(printable(f"report   {report.build(runs, cfg.output or default)}"))


if __name__ == "__main__":
    run(main)
