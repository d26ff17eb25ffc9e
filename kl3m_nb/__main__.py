"""`python -m kl3m_nb …`: see `cli`."""

import sys

from kl3m_nb.cli import main

if __name__ == "__main__":
    sys.exit(main())
