"""Training: the train command's body, and callbacks that any sentence-transformers script can add.

Nothing is imported here, so that a script which wants one callback does not load the rest.
"""
