"""oci-mirror: a pull-through mirror for container registries.

Rooms, and the only direction in which they import each other::

    client -> web -> pull -> store
                      `----> upstream        oci is the ground floor

See ``docs/design.md``.
"""

__version__ = "0.1.0"
