"""Time one outer step (second order, Adam on every shared parameter), ours and the JAX peer in turns; one JSON line.

python benchmarks/meta.py --precision float32,bf16
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.compare import arguments, compare

if __name__ == "__main__":
    print(json.dumps(compare(arguments("meta", batch=8, description=__doc__))))
