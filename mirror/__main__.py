"""``python -m mirror`` is ``oci-mirror``."""

import sys

from mirror.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
