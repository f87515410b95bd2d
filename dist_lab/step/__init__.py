"""What happens in a step, and when: the protocol of strategies, and the plain runner."""
