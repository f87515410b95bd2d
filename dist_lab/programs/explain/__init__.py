"""The code of `launch/explain.py`: a dry run of one step of one rank, and pictures of the mesh."""
