"""Runs a command inside the box and measures it from beside it; prints one line of JSON.

measure.py COMMAND... -> {"lines": [[seconds, CPU seconds, peak bytes, text], ...], "rss": bytes, "code": exit code}
Seconds count from the command's start, CPU seconds are user + system of it and of its ended children, peak bytes
are anonymous memory of the whole container, the line's moment included.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def anonymous() -> int:
    """Bytes of anonymous memory of this container, all processes together (cgroup v2, else v1)."""
    for file, key in (("memory.stat", "anon "), ("memory/memory.stat", "total_rss ")):
        path = Path("/sys/fs/cgroup", file)
        if path.exists():
            return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))
    return 0


def main() -> None:
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], anonymous())

    started = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    threading.Thread(target=watch, daemon=True).start()
    lines = []
    for line in process.stdout:
        now = time.perf_counter() - started
        cpu = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:15])) / TICK
        peak[0] = max(peak[0], anonymous())
        lines.append((now, cpu, peak[0], line.rstrip("\n")))
    code = process.wait()
    over.set()
    rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"lines": lines, "rss": rss, "code": code}))


if __name__ == "__main__":
    main()
