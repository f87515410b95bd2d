"""The collectives on sends and receives: `algorithms`, their `costs`, and their `messages`."""
