"""Entry point of the command: light, so that an interrupt in its first moments finds it ready."""

import os  # which Python itself has imported
import sys


def main() -> None:
    """Runs the command; without a terminal's streams where they were closed."""
    try:
        import signal  # takes a while, too

        # A shell has what runs in the background ignore it.
        heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if heard:
            signal.signal(signal.SIGINT, _stop)
        _open_streams()
        from converter.cli import main as command  # takes long

        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except KeyboardInterrupt:
        _stop()


def _stop(*_: object) -> None:
    """Ends the process at once: what is half imported may take an exception for its own."""
    os.write(2, b"ERROR: Interrupted; nothing was written.\n")
    os._exit(130)


def _open_streams() -> None:
    """Whoever closed a standard stream would have files of ours take its number, and get what is
    meant for it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the least number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: PTH123, SIM115
