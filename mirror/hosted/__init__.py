"""Hosted repositories: content that clients push to this server.

Lives here: the names of hosted content, uploads, which manifests are accepted, the quota. Must not
know: HTTP, who the client is, upstreams.

Theory of operation: bytes are shared, names are not. The bytes of a pushed blob are content in
``blobs/`` like all other content, one copy together with the cache. Which repository has which
content is recorded in a database of its own, ``hosted/names.db``. It is no cache: a push is
acknowledged once its row is durable, and content that a row names is never evicted. Content that no
row names any more is cache again, and goes when space is needed.

Reading order: ``hosted_service.py`` has the parts. ``sessions.py`` has the uploads,
``hosted_blobs.py``, ``hosted_manifests.py`` and ``hosted_lists.py`` the other operations,
``database.py`` and ``name_rows.py`` the rows.
"""
