"""Webhooks: events of pushes, deletions and pulls, for targets that the configuration names.

Lives here: the CloudEvents form, signatures, the queue on disk, and deliveries. Must not know: HTTP
towards clients, how content is obtained, who emits an event.

A notification is an event as one target gets it. Theory of operation: ``notification_recorder.py``
is an observer on the event loop. It gives batches to a thread, which puts notifications into the
queue, a SQLite file that all worker processes share. The process that holds the lock of
``deliver.lock`` sends them, in the order of the queue, one at a time for each target, and deletes
each that the target has accepted. So a notification is sent at least once, always with the same id.
"""
