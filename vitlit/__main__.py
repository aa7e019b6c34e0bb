"""`python -m vitlit`"""

import sys

from vitlit.cli import main

sys.exit(main())
