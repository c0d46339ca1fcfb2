"""The entry point, which answers signals before anything slow is imported."""

import sys

from vitral.runtime.stopping import Interrupted, end_on_signals, leave_signals_to_the_system


def main() -> None:
    end_on_signals()
    try:
        from vitral.cli.app import main as command_line

        command_line()
    except Interrupted as interrupted:
        sys.stderr.write(f"vitral: {interrupted}\n")
        sys.exit(interrupted.status)
    finally:
        leave_signals_to_the_system()


if __name__ == "__main__":
    main()
