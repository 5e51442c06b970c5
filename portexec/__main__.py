"""The program: the command `portexec`, and `python -m portexec`."""

import gc
import sys

# What is imported and made on the way to the command is no garbage. To look for garbage takes a tenth of the time.
gc.disable()

from portexec.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
