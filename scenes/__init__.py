"""Scenes: the small world that the bundled model draws, its captions, and the scorer that reads pictures back.

Nothing here needs torch: the same rules make training data, tests and scores.
"""
