"""Rank processes: started warm, heard out together, gone when their parent is.

`ranks` starts and ends them, `failures` tells what went wrong on several at once, `pool` keeps some
warm for tests.
"""
