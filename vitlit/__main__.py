"""`python -m vitlit`"""

import sys

from vitlit.cli.main import main

sys.exit(main())
