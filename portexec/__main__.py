"""`python -m portexec`, the same as the command `portexec`."""

import sys

from portexec.cli import main

sys.exit(main())
