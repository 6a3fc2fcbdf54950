"""The parts of benchmarks/campaign.py."""

import time

BEGUN = time.monotonic()  # of the process, nearly: what is imported next takes seconds, which are part of a call
