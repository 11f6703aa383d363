"""`python -m qcowlib` is the command qcow."""

import sys

from qcowlib.cli.main import main

sys.exit(main())
