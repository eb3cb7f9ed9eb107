"""Where `penstock` begins. What serving takes longest for begins here too, before the command line is read."""

import sys

from penstock.errors import PenstockError
from penstock.launch.process import started_early
from penstock.uncollected import uncollected


def main() -> None:
    """Run the command line; what the user can fix is one line and status 1."""
    arguments = sys.argv[1:]
    try:
        with started_early(is_wanted=arguments[:1] == ["serve"] and "--help" not in arguments):
            with uncollected():
                from penstock.cli.app import app

            app()
    except PenstockError as error:
        sys.stderr.write(f"error: {error.message}\n")
        sys.exit(1)
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)
