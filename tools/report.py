"""Write a page about a run, or overlay several: python tools/report.py RUN [RUN2 ...] [--output FILE]

RUN is an output directory of sft.py, which writes this page itself at every checkpoint.
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
from settings.errors import run
from settings.parser import parse, setting


@dataclass
class Config:
    """Write a page about a run, or overlay several: python tools/report.py RUN [RUN2 ...] [flags]"""

    output: str | None = setting(None, "page to write; none is RUN/report.html, of several runs "
                                    "./comparison.html", group="report")


def main():
    words = sys.argv[1:]
    n_runs = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    cfg, _ = parse(Config, words[n_runs:])
    runs = words[:n_runs] or ["./outputs"]
    path = cfg.output or (os.path.join(runs[0], "report.html") if len(runs) == 1 else "comparison.html")
    print(f"report   {report.build(runs, path)}")


if __name__ == "__main__":
    run(main)
