"""Measuring beside other programs: sees when they took processor time, and measures again."""

import os
import resource
import statistics
import time
from pathlib import Path

# Cores that other programs may use before a measurement counts as disturbed.
ALLOWED = 0.25
TRIES = 4


def _busy():
    """Seconds of processor time that the machine spent, and that this process and its children did."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), own


class Watch:
    """Cores that others took between the construction and `others()`. Children count once they ended."""

    def __init__(self):
        self.start, self.before = time.perf_counter(), _busy()

    def others(self):
        machine, own = (now - then for now, then in zip(_busy(), self.before))
        return max(0.0, machine - own) / max(time.perf_counter() - self.start, 1e-9)


def wait(patience=60.0):
    """Waits, but not for ever, until others are quiet."""
    end = time.time() + patience
    while time.time() < end:
        watch = Watch()
        time.sleep(0.5)
        if watch.others() < ALLOWED:
            return


def undisturbed(measure):
    """What `measure()` gives, and how many cores others took meanwhile. A disturbed measurement is made
    again; if none is undisturbed, the one that was least so is taken, and its number says so."""
    seen = []
    for _ in range(TRIES):
        wait()
        watch = Watch()
        value = measure()
        seen.append((watch.others(), value))
        if seen[-1][0] <= ALLOWED:
            break
    others, value = min(seen, key=lambda s: s[0])
    return value, others


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": list(values)}


def shown(s, digits=1):
    return f"{s['median']:.{digits}f} [{s['min']:.{digits}f} .. {s['max']:.{digits}f}]"
