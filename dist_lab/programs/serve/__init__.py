"""Serves a model over HTTP, in the format of OpenAI's API."""
