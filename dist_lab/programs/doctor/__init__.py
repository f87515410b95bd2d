"""`dist_lab.doctor` and `launch/doctor.py`: examine a user's model before it is trained."""
