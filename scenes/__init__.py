"""Scenes: the small world of the bundled model, its captions, and the scorer of its images.

Nothing here needs torch: the same rules make training data, tests and scores.
"""
