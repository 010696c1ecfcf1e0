"""Runs a Plan on one model: steps over flat ragged batches, shared-prefix KV, sampling."""
