"""python -m fuxi_torchrec"""

import sys

from fuxi_torchrec.cli import main

sys.exit(main())
