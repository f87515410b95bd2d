"""What `launch/doctor.py` runs: a user's model, looked at before it is trained."""
