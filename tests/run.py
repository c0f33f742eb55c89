"""Run the test suite: `python tests/run.py [pytest arguments]`, with `--soak` the long tests too.

The first start makes an environment and gets ComfyUI (see tests/host); later starts take seconds.
"""

import os
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parent.parent
sys.path.append(str(ROOT / "tests"))

from host import environment  # noqa: E402

if __name__ == "__main__":
    environment.enter(ROOT)
    os.chdir(str(ROOT))
    environment.become([sys.executable, "-m", "pytest", *sys.argv[1:]])
