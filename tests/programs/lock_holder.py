"""Takes the lock of a file and holds it for a minute: lock_holder.py FILE

No fault is planted.
"""

import sys
import time

from disk import files

with open(sys.argv[1], "a+", encoding="utf-8") as lock:
    files.take_lock(lock, 1)
    print("held", flush=True)
    time.sleep(60)
