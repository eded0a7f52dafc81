"""Layer parallel: the local modules of one model on several ranks. Each trains its own as batches arrive; features go
forward, and nothing comes back.
"""
