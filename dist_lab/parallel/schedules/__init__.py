"""Pipeline schedules as plain data: which rank computes what, and in which order. No torch."""
