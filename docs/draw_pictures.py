"""Run every example and put its picture, small, into docs/pictures: `make pictures`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"
ON_RANKS = [Path(sys.executable).with_name("mpiexec"), "-n", "2"]

for name in re.findall(r"\(pictures/(\w+)\.png\)", (DOCS / "gallery.md").read_text()):
    launched = ON_RANKS if name == "train_distributed" else []
    subprocess.run([*launched, sys.executable, EXAMPLES / f"{name}.py"], check=True)
    with Image.open(EXAMPLES / "output" / f"{name}.png") as picture:
        small = picture.convert("RGB")
        small.thumbnail((1200, 1200))
        # Maximum coverage keeps the few pixels of a thin line in their color.
        small = small.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
        small.save(DOCS / "pictures" / f"{name}.png", optimize=True)
