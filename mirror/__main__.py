"""Run the command ``oci-mirror``: ``python -m mirror``.

Lives here: what has to happen before the other modules are imported, which takes 0.2 s. Must not
know: the commands.
"""

from __future__ import annotations

import gc
import sys

from mirror.cli.exit_codes import EX_INTERRUPTED


def main() -> int:
    """Run a command and return its exit code. Raises nothing."""
    try:
        gc.disable()  # Imports make 100,000 objects, none of which is garbage.
        from mirror.cli.main import main as run

        gc.freeze()  # They stay until the end, so no later collection looks at them.
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    finally:
        gc.enable()
    code = run()
    gc.disable()  # The interpreter would look at all objects once more before it ends.
    return code


if __name__ == "__main__":
    sys.exit(main())
