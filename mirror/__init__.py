"""oci-mirror: a pull-through mirror for container registries.

The packages, and the only direction in which they import each other::

    web -> pull -> store
             `---> upstream        all of them may import oci

See ``docs/architecture.md``.
"""

__version__ = "0.1.0"
