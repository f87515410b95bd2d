"""Training whose matrix products read numbers of 8 or 4 bits: formats, codecs and recipes."""
