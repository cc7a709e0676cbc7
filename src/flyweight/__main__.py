"""`python -m flyweight`, where no script was installed."""

import sys

from flyweight.cli import main

sys.exit(main())
