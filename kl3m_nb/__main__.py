"""`python -m kl3m_nb …`: see `cli`."""

import sys

if __name__ == "__main__":
    try:
        from kl3m_nb.cli import main

        exit_code = main()
    except KeyboardInterrupt:  # the imports take seconds; what comes after them answers for itself
        print("Interrupted.", file=sys.stderr)
        exit_code = 130
    sys.exit(exit_code)
