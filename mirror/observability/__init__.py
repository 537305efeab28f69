"""What operators see: events, log lines, metrics.

Other packages report frozen events (``events``) to an observer. ``logs`` and ``metrics`` are the
observers. Must not know: who reports an event, or why.

Nothing is imported here: ``prometheus_client`` reads its environment when it is imported, so the
server decides when that happens.
"""
