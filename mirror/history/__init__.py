"""The history: pulls with their stages, counters, tag moves, and a trace of accesses.

Lives here: one SQLite file in the data directory, its writer and its reader, and what can be said
from it: why a pull was a miss or slow, what the cache saves, what another disk size would change.
It is a cache: all of it may be lost, and serving never waits for it. Must not know: HTTP, the
command line, how content is obtained.

Reading order: ``recorder.py`` observes events on the event loop, and hands over a batch once a
second. ``writer.py`` writes batches in a thread. ``queries.py`` reads. The others are pure.
"""
