"""Latency: documented and recorded baselines, the guide's protocol, and a gate that fails closed.

Reading order: ``rows`` (what a row is), ``documented`` and ``recorded`` (what it is compared with), ``protocol`` (how
it is measured), ``gate`` (the verdict on one row), ``plugin`` (the verdict on a session). Only what measures imports
torch.
"""
