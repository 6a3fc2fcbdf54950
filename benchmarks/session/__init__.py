"""The parts of benchmarks/campaign.py."""
