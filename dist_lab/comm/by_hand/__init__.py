"""The collectives as messages: `algorithms`, what they cost, how they are sent."""
