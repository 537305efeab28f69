"""oci-mirror: a pull-through mirror for container registries.

Packages, and the direction of their imports (each may also import what is further right)::

    cli -> server -> web -> pull -> store
                             `----> upstream

- ``cli``: commands and their output.
- ``server``: composes all packages, and runs the worker processes.
- ``web``: HTTP towards clients.
- ``pull``: decides what is served, and fetches content that is missing.
- ``store``: content and records on disk.
- ``upstream``: HTTP towards registries.

All of these may import ``oci`` (names, digests, header fields, errors), ``config.settings``,
``observability.events``, ``single_flight`` and ``threads``. Of ``store``, ``web`` may import
``store.reader`` only; of ``upstream``, nothing. ``tests/unit/test_architecture.py`` checks every
import. See ``docs/architecture.md``.
"""

__version__ = "0.1.0"
