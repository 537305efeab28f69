"""Decide how a pull is served: from the cache, from a running fetch, or from the upstream.

Must not know: aiohttp, paths of files.

Reading order:

1. :mod:`~mirror.pull.service`: the interface of this package. It admits a request and passes it on.
2. :mod:`~mirror.pull.admission`: rules that deny a repository before anything is read or fetched.
3. :mod:`~mirror.pull.content`: content by digest. Checks who may read it, then serves it.
4. :mod:`~mirror.pull.fetch`: fetches missing content, once for all clients that want it. They join
   in :mod:`~mirror.pull.running_fetches`.
   Large blobs by several connections: :mod:`~mirror.pull.parallel`, with the policies
   :mod:`~mirror.pull.pieces` (which bytes), :mod:`~mirror.pull.trial` (the second connection),
   :mod:`~mirror.pull.ramp` (how many more), :mod:`~mirror.pull.connection_failures` and
   :mod:`~mirror.pull.connection_budget`. Ranges far ahead of a fetch: :mod:`~mirror.pull.aside`,
   with :mod:`~mirror.pull.range_readers`.
5. :mod:`~mirror.pull.manifests`: manifests by digest and by tag, on top of ``content``.
6. :mod:`~mirror.pull.lists`: tag lists and referrers.
7. :mod:`~mirror.pull.freshness`: pure decisions that 3, 5 and 6 share: fresh, ask, or stale.

:mod:`~mirror.pull.requests` and :mod:`~mirror.pull.results` hold the values that pass between them.
Work that several clients may wait for runs in :mod:`mirror.single_flight`.
"""
