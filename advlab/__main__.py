"""The command `advlab`, also as `python -m advlab`."""

import io
import signal
import sys
from typing import NoReturn


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; where it cannot even be imported, say what is wrong with the machine.

    Raises:
        SystemExit: with the command's exit code; 1 if it could not start.
    """
    # An ASCII terminal shows the name of a file all the same.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: nothing that was started is left running
    if sys.argv[1:2] == ["setup"]:  # before anything else is installed
        from advlab.upkeep import setup

        return setup.main(sys.argv[2:])
    try:
        from advlab import cli
    except Exception as error:  # a torch that is broken raises more than ImportError
        from advlab.upkeep import doctor

        print(f"advlab cannot start: {error!r}. The doctor says:", file=sys.stderr)
        print(doctor.report(doctor.run_checks()))
        raise SystemExit(1) from None
    cli.app()


if __name__ == "__main__":
    main()
