"""The command line of every program: settings, their limits, and the model, data and job built from
them. Only `setup` imports torch.
"""
