"""The output of a run: logs, progress, pictures, and measurements of memory, MFU and traffic."""
