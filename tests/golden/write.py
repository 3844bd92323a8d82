"""Write the golden loss curves: python tests/golden/write.py [METHOD ...]

To be run when a change is meant to move them, and never to make a test pass.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest


def main() -> None:
    here = Path(__file__).parent
    names = sys.argv[1:] or ["denoise", "dpo", "consistency", "dmd", "reward", "flow_grpo", "refl", "dreambooth"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MEZZOTINT_WRITE_GOLDEN"] = folder
        for name in names:
            pytest.main([f"{here.parent}/methods/test_methods.py", "-q", "-k", f"test_every_method_learns and {name}"])
            losses = json.loads((Path(folder) / f"{name}.json").read_text())
            (here / f"{name}.json").write_text(json.dumps(losses) + "\n")


if __name__ == "__main__":
    main()
