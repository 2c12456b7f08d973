"""Runs sft.py on many ranks and counts the requests of its store: count_store.py flags of sft.py ...

No fault is planted. Each rank writes `requests RANK.json` into the current directory: {what asks: {"METHOD KEY": n}}.
What asks is "step N" (the main thread, from the begin of step N to that of the next phase), "watchdog", and "else".
Numbers in keys are replaced by #. A request of several keys has their number: "multi_get state # × 4".
"""

import json
import os
import re
from collections import Counter, defaultdict

import torch.distributed as dist

import sft
from ranks import processes

METHODS = "set", "get", "add", "check", "wait", "append", "compare_set", "multi_get", "multi_set", "delete_key"
counts = defaultdict(Counter)
phase = "start"


def counted(method):
    """A method of a store that counts the request, then makes it."""
    def call(self, keys, *arguments):
        names = [keys] if isinstance(keys, str) else list(keys)
        what = f"{method} {re.sub('[0-9a-f]*[0-9]+', '#', names[0])}" + f" × {len(names)}" * (len(names) > 1)
        who = "watchdog" if self.is_watchdog else phase
        counts[who if re.match("watchdog|step", who) else "else"][what] += 1
        return getattr(self.store, method)(keys, *arguments)
    return call


class CountingStore(dist.Store):
    """A store whose requests are counted, also those that torch makes in C++."""

    def __init__(self, store, is_watchdog=False):
        super().__init__()
        self.store, self.is_watchdog = store, is_watchdog

    def clone(self):
        """processes.start() clones the store once, for the watchdog."""
        return CountingStore(self.store.clone(), is_watchdog=True)

    def set_timeout(self, timeout):
        self.store.set_timeout(timeout)


for name in METHODS:
    setattr(CountingStore, name, counted(name))

join, set_phase, close = processes.join, processes.Ranks.set_phase, processes.Watchdog.close


def enter(self, name):
    global phase
    phase = name
    set_phase(self, name)


def end(self):
    """The watchdog's last request is made; its beats say for how many ticks it ran."""
    close(self)
    counts["watchdog"]["beats"] = self.beat
    with open(f"requests {os.environ['RANK']}.json", "w", encoding="utf-8") as f:
        json.dump(counts, f)


processes.join = lambda *arguments: CountingStore(join(*arguments))
processes.Ranks.set_phase, processes.Watchdog.close = enter, end
sft.main()
