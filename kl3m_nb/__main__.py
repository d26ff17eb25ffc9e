"""`python -m kl3m_nb …`: see `cli`."""

import contextlib
import os
import signal
import sys

from kl3m_nb.common.printing import keep_printing
from kl3m_nb.common.stopping import EXIT_INTERRUPTED


def _end_at_once(*_) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"Interrupted.\n")
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    keep_printing()
    handler = signal.getsignal(signal.SIGINT)
    if (
        handler is signal.default_int_handler
    ):  # the imports take seconds, and some libraries swallow a KeyboardInterrupt
        signal.signal(signal.SIGINT, _end_at_once)
    from kl3m_nb.cli import main

    signal.signal(signal.SIGINT, handler)
    code = main()
    if (
        code == EXIT_INTERRUPTED
    ):  # everything is saved, and Python would wait for a thread whose read may never return
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
