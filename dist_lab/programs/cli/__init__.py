"""The command line of every program: settings, their names and limits, and the model,
data and job that they mean. Only `setup` imports torch.
"""
