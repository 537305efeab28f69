"""The admin API and its page: a person, or ``curl``, sees and changes the cache over HTTP.

It has a listener of its own, in one process of the server (:mod:`mirror.admin.listener`). Each
request passes, in this order:

1. ``guard``: the ``Host`` and the ``Origin`` are ours.
2. ``tokens``: the bearer token permits it.
3. ``fields``: its query and its body have the declared fields.
4. ``operations``: the table of all operations; each calls a function of ``sources``.

Jobs run in the background (``jobs``). ``event_stream`` sends what changes to open pages.
``live_state`` knows the pulls in flight and the health of the upstreams of its own process, and
``worker_channel`` brings those of the other workers.
"""
