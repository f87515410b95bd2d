"""The events of a step: the protocol of strategies, and the plain runner."""
