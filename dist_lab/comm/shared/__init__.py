"""The collectives in memory that ranks of one machine share."""
