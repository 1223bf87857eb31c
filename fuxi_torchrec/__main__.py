"""python -m fuxi_torchrec"""

import sys

from fuxi_torchrec.cli.main import main

sys.exit(main())
