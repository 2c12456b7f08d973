"""Runs sft.py on many ranks and counts the requests of its store: count_store.py flags of sft.py ...

No fault is planted. Each rank of N writes `requests RANK of N.json` into the current directory: {when: {"METHOD KEY":
n}}, where numbers in keys are #. When is "step N" (the main thread, from the beginning of step N to that of the next
phase), "watchdog" (its thread, all the time; "ticks": how many), or "else".
"""

import json
import os
from collections import Counter, defaultdict

import sft
from ranks import processes
from tools.bench_scale import CountedStore

counts, phases = defaultdict(Counter), ["start"]


def record(what, _):
    counts[phases[-1] if phases[-1].startswith("step") else "else"][what] += 1


class MainStore(CountedStore):
    """processes.start() clones it once, for the watchdog."""

    def clone(self):
        return CountedStore(self.store.clone(), lambda what, _: counts["watchdog"].update({what: 1}))


class Ranks(processes.Ranks):
    def set_phase(self, phase):
        phases.append(phase)
        super().set_phase(phase)

    def wait_for_all(self):
        super().wait_for_all()
        counts["watchdog"]["ticks"] = self.watchdog.beat


join = processes.join
processes.join = lambda *arguments: MainStore(join(*arguments), record)
processes.Ranks = Ranks
sft.main()
with open(f"requests {os.environ['RANK']} of {os.environ['WORLD_SIZE']}.json", "w", encoding="utf-8") as f:
    json.dump(counts, f)
