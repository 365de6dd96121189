"""`widemargin evaluate`: a trained model on preference pairs and on the published benchmarks.

Official numbers come from the benchmarks' own tools and judges. What is here answers their
questions, writes the files that they read, and calls them; and measures what needs no judge.
"""
