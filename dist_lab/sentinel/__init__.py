"""The sentinel: compares over ranks what should be equal on several of them."""
