"""Time encoding (three inner steps, no PSNR pass), ours and the JAX peer in turns; prints one JSON line.

python benchmarks/encode.py --precision float32,bf16
python benchmarks/encode.py --spatial 1 --channels 1024          # vector functa
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.compare import arguments, compare

if __name__ == "__main__":
    print(json.dumps(compare(arguments("encode", batch=32, description=__doc__))))
