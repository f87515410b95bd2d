"""The program demo.py: train, serve, complete."""
