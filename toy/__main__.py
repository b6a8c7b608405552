"""`toy`, and `python -m toy`: the command line, once it is imported."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from toy.cli import main

        main()
    except KeyboardInterrupt:  # before the command line could take it: imports take as long as a finger that slips
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from toy.cli import interrupted

        sys.exit(interrupted(sys.argv[1:]))


if __name__ == "__main__":
    main()
