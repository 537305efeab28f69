"""What the data directory holds, as operators see it: images, their parts, and who shares them.

Lives here: reading the index, the directories and the manifests into one frozen
:class:`~mirror.inventory.model.Inventory`, and the questions that it answers. Must not know: HTTP,
the event loop, how content is removed.

All of it blocks: call it from a command, or in a thread. It writes nothing but a cache of parsed
manifests, and works beside running servers.

Reading order:

1. :mod:`~mirror.inventory.model`: the values, and the questions that they answer.
2. :mod:`~mirror.inventory.manifest_parsing`: a manifest and its parts, parsed.
   :mod:`~mirror.inventory.manifest_cache` keeps them between runs, in the pages of
   :mod:`~mirror.inventory.manifest_pages`.
3. :mod:`~mirror.inventory.sharing`: what each name reaches, and what only one name reaches.
   :mod:`~mirror.inventory.keeping`: which names the marks keep from removal.
   :mod:`~mirror.inventory.index_platforms`: which digests are only a part of an image index.
4. :mod:`~mirror.inventory.read`: from the data directory to an inventory.
5. :mod:`~mirror.inventory.usage` (``du``), :mod:`~mirror.inventory.tree` (``show``) and
   :mod:`~mirror.inventory.json_rows` (JSON).
"""
