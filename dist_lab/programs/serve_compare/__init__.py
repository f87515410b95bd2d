"""Races the policies of well-known servers on one trace of requests."""
