"""Keep content on disk by its digest, serve it while it arrives, and evict it when space is needed.

Must not know: HTTP, registries, which repository may read which content.

Other packages begin at :class:`~mirror.store.store.Store`, the data directory of one process. From
it they get the :class:`~mirror.store.blobs.BlobStore`, which opens whole content, the
:class:`~mirror.store.index.Index`, which keeps records about content, and an
:class:`~mirror.store.ingest.Ingest` for each content that is being fetched. Cached content and
content that is being fetched are read through one protocol, :class:`~mirror.store.reader.Reader`.

Reading order:

1. :mod:`~mirror.store.store`: composes all the others, and owns their threads.
2. :mod:`~mirror.store.disk`: the paths below ``data_dir``, and the system calls on these files.
3. :mod:`~mirror.store.reader`: how content is read, whatever its state.
4. :mod:`~mirror.store.blobs`: whole content. Trusts a recent verification, and hashes again later.
5. :mod:`~mirror.store.ingest`: content that is being fetched, in this process or in another one.
   Begin with its theory of operation, then read ``ingest_lock``, ``ingest_writer``, ``follower``,
   ``window`` and ``other_process``.
6. :mod:`~mirror.store.space`: the running total of what the directory holds, and room for more.
   :mod:`~mirror.store.eviction`: scans of the directory, and which content is evicted first.
   :mod:`~mirror.store.marks`: pins, freezes, blocks and leases. :mod:`~mirror.store.protection`:
   the content that they keep.
7. :mod:`~mirror.store.index`: tags, access records, negative responses. ``records`` are its
   values, ``rows`` its database, ``pending_rows`` what is queued for it,
   ``index_directory`` replaces a damaged one, ``names`` restores it,
   ``orphans`` decides which records are deleted, and ``orphaned_rows`` deletes them.
8. :mod:`~mirror.store.recovery` and :mod:`~mirror.store.image_layout`: what a start repairs after a
   crash, and ``index.json``, from which a lost index is restored.

Contracts that the whole package keeps:

- A file under ``blobs/`` is complete, and it was hashed before it got there.
- No client receives whole content with a wrong byte: the last byte waits for the hash.
- Several processes may share one data directory. File locks (``flock``) coordinate them, and the
  kernel releases the locks of a process that dies.
- The index may be lost: then content is fetched again, and nothing wrong is served.
"""
