"""Checkpoints as other programs' files, and back: Hugging Face folders, torch's DCP folders, and
`state_dict` files. Every format is one file of this folder; see README.md.
"""
